"""What ends a service: signals, and failures reported from any thread."""

from __future__ import annotations

import asyncio
import signal
import threading
from types import TracebackType
from typing import Self

import structlog

from specpair.v1 import common_pb2
from specpair_runtime.serving.status import ServiceStatus, StatusSnapshot

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Ending:
    """Two futures with exit statuses, in force inside a `with` block on the event loop.

    `asked` is 0 after the first SIGTERM or SIGINT and 1 after a failure. `forced` is 128 plus the number of a signal
    that came once `asked` was done. Signals are only taken over in the main thread, where alone Python allows it.
    """

    def __init__(self, status: ServiceStatus) -> None:
        self._loop = asyncio.get_running_loop()
        self._status = status
        self._catches = threading.current_thread() is threading.main_thread()
        self.asked: asyncio.Future[int] = self._loop.create_future()
        self.forced: asyncio.Future[int] = self._loop.create_future()

    def __enter__(self) -> Self:
        self._forget = self._status.listen(self._on_status)
        for number in _SIGNALS if self._catches else ():
            self._loop.add_signal_handler(number, self._on_signal, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in _SIGNALS if self._catches else ():
            self._loop.remove_signal_handler(number)
        self._forget()

    def _on_signal(self, number: signal.Signals) -> None:
        structlog.get_logger("specpair").info("stopping", signal=number.name)
        if not self.asked.done():
            self.asked.set_result(0)
        elif not self.forced.done():
            self.forced.set_result(128 + number)

    def _on_status(self, now: StatusSnapshot) -> None:
        if now.phase == common_pb2.PHASE_FAILED:
            self._loop.call_soon_threadsafe(self._on_failure)

    def _on_failure(self) -> None:
        if not self.asked.done():
            self.asked.set_result(1)
