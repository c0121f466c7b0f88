"""Whatever comes over a socket, the service goes on serving and keeps nothing of it."""

from __future__ import annotations

import contextlib
import random
import time

import psutil
import pytest

from ..amounts import seconds
from ..e2e.processes import wait_for
from .attacks import attack, connect, slow_beginning

# Attacks between two good requests.
_TURN = 40
# Half-open connections at a time, as of a slow loris.
_SLOW = 100
# File descriptors that gRPC's pollers and the like may come to hold for good.
_SPARE = 4


@pytest.mark.parametrize("role", ["target", "draft"])
class TestSockets:
    """Either service, by its plain port."""

    def test_anything(self, subjects, role):
        """Between attacks good requests get the same tokens; afterwards no slot and no file descriptor is in use."""
        subject = subjects[role]
        process, address = psutil.Process(subject.service.process.pid), subject.service.address
        before = subject.ask(subject.service)
        settled = process.num_fds()
        chance = random.Random(role)
        end = time.monotonic() + seconds(4) / 2
        while time.monotonic() < end:
            for _ in range(_TURN):
                attack(address, chance)
            subject.still_well(before)
        wait_for(lambda: process.num_fds() <= settled + _SPARE, 30, f"{settled} file descriptors again")

    def test_slow_beginnings(self, subjects, role):
        """Connections that never get beyond the first bytes keep nobody else from being served."""
        subject = subjects[role]
        process, address = psutil.Process(subject.service.process.pid), subject.service.address
        before = subject.ask(subject.service)
        settled = process.num_fds()
        chance = random.Random(role)
        with contextlib.ExitStack() as stack:
            for _ in range(_SLOW):
                stack.enter_context(connect(address)).sendall(slow_beginning(chance))
            subject.still_well(before)
        wait_for(lambda: process.num_fds() <= settled + _SPARE, 30, f"{settled} file descriptors again")
