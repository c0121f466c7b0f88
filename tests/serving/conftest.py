"""Servers on loopback: in this process, and as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest

from specpair.v1 import target_pb2_grpc
from specpair_runtime.serving import ServiceStatus, serve

_SCRIPT = Path(__file__).parent / "fake_target.py"


@pytest.fixture(scope="session")
def fake():
    """The module fake_target."""
    spec = importlib.util.spec_from_file_location("fake_target", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Running:
    """A service inside this process, with a channel to it."""

    def __init__(self, servicer, task, channel, address):
        self.servicer, self.task, self.channel, self.address = servicer, task, channel, address
        self.status = servicer.status
        self.stub = target_pb2_grpc.TargetServiceStub(channel)

    async def until(self, condition):
        """Waits until `condition()` holds, at most 30 seconds."""
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@pytest.fixture
def running(fake):
    """An async context manager that runs a fake target; it takes serve's `load` and `close` and settings."""

    @contextlib.asynccontextmanager
    async def run(load=lambda status: None, close=lambda: None, registry=None, **settings):
        servicer = fake.FakeTarget(ServiceStatus())

        def register(server):
            target_pb2_grpc.add_TargetServiceServicer_to_server(servicer, server)
            return [fake.SERVICE]

        listening = asyncio.get_running_loop().create_future()
        config = fake.FakeConfig(**{"listen": "127.0.0.1:0", **settings})
        task = asyncio.create_task(
            serve(
                config,
                register=register,
                load=load,
                status=servicer.status,
                close=close,
                on_listening=listening.set_result,
                registry=registry,
            )
        )
        await asyncio.wait({task, listening}, return_when=asyncio.FIRST_COMPLETED)
        try:
            address = listening.result()
            async with grpc.aio.insecure_channel(address) as channel:
                yield Running(servicer, task, channel, address)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    return run


@pytest.fixture
def gate():
    """A load that lasts until the event is set."""
    event = threading.Event()
    yield event
    event.set()


class Process:
    """A fake target in a process of its own, with JSON logs."""

    def __init__(self, *flags, env=None):
        command = [sys.executable, str(_SCRIPT), "--listen=127.0.0.1:0", "--log-format=json", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.lines = []

    def wait_for(self, event):
        """The next log line whose event begins with `event`."""
        for line in self.process.stderr:
            self.lines.append(line)
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                if entry["event"].startswith(event):
                    return entry
        raise AssertionError(f"no {event!r} in:\n{''.join(self.lines)}")

    def finish(self):
        """Exit status, within 20 seconds; the rest of the log goes to `lines`."""
        self.lines += self.process.communicate(timeout=20)[1].splitlines(keepends=True)
        return self.process.returncode


@pytest.fixture
def start():
    """Starts fake targets as processes and ends those left over."""
    started = []

    def launch(*flags, env=None):
        started.append(Process(*flags, env=env))
        return started[-1]

    yield launch
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        one.process.stderr.close()
