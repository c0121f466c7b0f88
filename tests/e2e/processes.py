"""The services as processes of their own, on free loopback ports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specpair.v1 import draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc

from ..proxy import bound

DEMO = Path(__file__).parents[2] / "models" / "demo"

# Bounds that stand for "does not hang", in seconds.
_START = 180
_STOP = 30
_CALL = 30

# The `draft_timeout`, in seconds, with which no draft is lost because a machine is busy.
UNHURRIED = 60.0


def environment(**extra):
    """The environment for a process under test: nothing of ours configures it, and nothing is fetched."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SPECPAIR_")}
    return {**inherited, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **extra}


def script(name):
    """A command that the installation provides."""
    return Path(sys.executable).with_name(name)


def wait_for(condition, within, what):
    """Waits until `condition()` is true and returns its value; fails after `within` seconds."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        time.sleep(0.01)
    return value


def leftovers(group):
    """Whether any process of a process group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class Service:
    """One service process. It starts at once; whatever needs its address waits until it is healthy."""

    def __init__(self, role, log, *flags, listen=True, env=None, connect=grpc.insecure_channel, launcher=()):
        self.role = role
        self.log = Path(log)
        self._command = [*(launcher or [script(f"specpair-{role}")]), "--log-format=json", *flags]
        self._listen = listen
        self._env = env or {}
        self._connect = connect
        # Nobody else gets the port, also between two lives of the service.
        self._place = bound(0)
        self._start()

    def _start(self):
        placed = [f"--listen=127.0.0.1:{self.port}", "--threads=1"] if self._listen else []
        with self.log.open("ab") as output:
            self._begin = output.tell()
            self.process = subprocess.Popen(
                [*self._command, *placed],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(**self._env),
                start_new_session=True,
            )
        self._address = None
        self._channel = None

    @property
    def port(self):
        """Where it listens, or is going to, unless its flags say otherwise."""
        return self._place.getsockname()[1]

    @property
    def address(self):
        """HOST:PORT of the healthy service."""
        if self._address is None:
            address = wait_for(self._listening, _START, f"{self.role} listening")
            self._channel = self._connect(address)
            wait_for(self._healthy, _START, f"{self.role} healthy")
            self._address = address
        return self._address

    @property
    def channel(self):
        """A blocking channel."""
        return self.address and self._channel

    @property
    def alive(self):
        """Whether the process runs."""
        return self.process.poll() is None

    @property
    def text(self):
        """Everything that the process wrote; what others wrote before it may be long."""
        with self.log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace")

    def entries(self):
        """Log lines so far."""
        for line in self.text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if isinstance(entry := json.loads(line), dict):
                    yield entry

    def info(self):
        """ModelInfo, now."""
        if self.role == "target":
            stub = target_pb2_grpc.TargetServiceStub(self.channel)
            return stub.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest(), timeout=_CALL).info
        stub = draft_pb2_grpc.DraftServiceStub(self.channel)
        return stub.GetModelInfo(draft_pb2.DraftServiceGetModelInfoRequest(), timeout=_CALL).info

    def wait_until_free(self, within=10.0):
        """Waits until no slot is in use."""
        wait_for(lambda: self.info().slots_in_use == 0, within, f"every slot of {self.role} free")

    def send(self, number):
        """Sends a signal to the process."""
        self.process.send_signal(number)

    def wait(self, within=_STOP):
        """Exit status of a process that is about to end."""
        return self.process.wait(within)

    def kill(self):
        """Ends the process as a crash would, and waits until it is gone."""
        self.send(signal.SIGKILL)
        self.process.wait()

    def restart(self):
        """Starts the process again at the address that it had. `address` waits until it is healthy."""
        assert not self.alive, f"{self.role} still runs"
        self._channel.close()
        self._start()

    def ask_to_stop(self):
        """Ends the process as an operator would; `wait` waits for it."""
        if self._channel is not None:
            self._channel.close()
        if self.alive:
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)

    def stop(self):
        """Ends the process and makes sure that nothing is left of it. Returns its exit status."""
        self.ask_to_stop()
        try:
            return self.wait()
        finally:
            if self.alive:
                self.process.kill()
                self.process.wait()
            self._place.close()
            assert not leftovers(self.process.pid), f"{self.role} left processes behind"

    def _listening(self):
        self._check()
        return next((entry["address"] for entry in self.entries() if entry["event"] == "listening"), None)

    def _healthy(self):
        self._check()
        try:
            answer = health_pb2_grpc.HealthStub(self._channel).Check(health_pb2.HealthCheckRequest(), timeout=_CALL)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def _check(self):
        assert self.alive, f"{self.role} ended with status {self.process.returncode}:\n{self.text}"


def run(work, within=180):
    """Runs a coroutine to its end; `within` seconds stand for "does not hang"."""

    async def bounded():
        async with asyncio.timeout(within):
            return await work

    return asyncio.run(bounded())
