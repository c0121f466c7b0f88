"""Both services as child processes, for the demonstration."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from specpair.errors import ModelLoadError
from specpair.grpc_transports import GrpcDraft, GrpcTarget
from specpair.messages import Phase
from specpair.waiting import Sight, Waited

__all__ = ["Service", "started"]

# Seconds that a service has to stop after SIGTERM before it is killed.
_GRACE = 5.0


class Service:
    """A service process on a free loopback port."""

    def __init__(self, name: str, probe: type[GrpcTarget | GrpcDraft], flags: Sequence[str], log: IO[bytes]) -> None:
        self.name = name
        self._probe = probe
        self.address = f"127.0.0.1:{_free_port()}"
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"specpair_{name}", "--listen", self.address, *flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Waiting OpenMP threads must not spin for long: the two services share the cores.
            env={"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000", **_environment(name)},
        )

    async def wait(self, show: Callable[[Waited, Sight], None]) -> None:
        """Waits until the service serves; `show` is told how far it is.

        Raises ModelLoadError with the service's own last words if it ends instead.
        """
        probe = self._probe(self.address)
        waited = Waited(self.name, self.address, probe)
        try:
            while (sight := await waited.look()).phase is not Phase.READY:
                show(waited, sight if sight.phase is not None else Sight(None, detail="starting"))
                if self._process.poll() is not None:
                    raise ModelLoadError(f"the {self.name} ended with code {self._process.returncode}: {self._words()}")
                await asyncio.sleep(0.1)
            show(waited, sight)
        finally:
            await probe.close()

    def terminate(self) -> None:
        """Asks the process to stop."""
        if self._process.poll() is None:
            self._process.terminate()

    def reap(self) -> None:
        """Waits for the process, and kills it when it does not stop in time."""
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _words(self) -> str:
        """What the service said last."""
        with Path(self._log.name).open("rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - 4096, 0))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"


def _environment(name: str) -> dict[str, str]:
    """This process's environment without the security of services that others use: here nobody else connects."""
    secured = tuple(f"SPECPAIR_{name.upper()}_{setting}" for setting in ("TLS_", "AUTH_"))
    return {key: value for key, value in os.environ.items() if not key.startswith(secured)}


@contextlib.contextmanager
def started(target: Sequence[str], draft: Sequence[str]) -> Iterator[tuple[Service, Service]]:
    """A target and a draft with the given flags; both have ended when the block has, however it ends."""
    services: list[Service] = []
    with contextlib.ExitStack() as logs:
        try:
            for name, probe, flags in (("target", GrpcTarget, target), ("draft", GrpcDraft, draft)):
                log = logs.enter_context(tempfile.NamedTemporaryFile(prefix=f"specpair-{name}-", suffix=".log"))
                with _undisturbed():
                    services.append(Service(name, probe, flags, log))
            yield services[0], services[1]
        finally:
            for service in services:
                service.terminate()
            for service in services:
                service.reap()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """SIGINT and SIGTERM wait for the end of the block: a process that has begun is not forgotten.

    They are not blocked, because a process would inherit that. Only the main thread can be disturbed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
