"""Measured times are the event loop's."""

from __future__ import annotations

import time
from functools import partial

import pytest

from specpair import turn
from specpair.clock import loop_time
from specpair.meter import Meter


def _clock() -> float:
    """The loop's; the synchronous client makes its turns outside of it, where that of a real loop is the same."""
    try:
        return loop_time()
    except RuntimeError:
        return time.monotonic()


@pytest.fixture(autouse=True)
def loop_timed(monkeypatch):
    """What a turn measures, and what it chooses by that, are in virtual time where its loop's time is."""
    monkeypatch.setattr(turn, "Meter", partial(Meter, _clock))


@pytest.fixture
def said(caplog):
    """Returns what the client has logged so far; gRPC and asyncio log, too."""
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("specpair")]
