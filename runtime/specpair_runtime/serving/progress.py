"""Shows a service's way to READY: a progress line on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from specpair.v1 import common_pb2
from specpair_runtime.serving.status import ServiceStatus, StatusSnapshot

_STARTING = frozenset({common_pb2.PHASE_LOADING, common_pb2.PHASE_COMPILING, common_pb2.PHASE_WARMING_UP})


@contextmanager
def shown(status: ServiceStatus, *, terminal: bool | None = None) -> Iterator[None]:
    """Shows the status on stderr inside the block; `terminal` None asks stderr whether it is one."""
    if terminal is None:
        terminal = sys.stderr.isatty()
    display = _ProgressLine() if terminal else _ProgressLog()
    forget = status.listen(display.update)
    try:
        yield
    finally:
        forget()
        display.close()


class _ProgressLine:
    """One line that is redrawn in place and disappears when the service is ready."""

    def __init__(self) -> None:
        # Log lines written meanwhile go through Progress, which prints them above the line.
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
        )
        self._task = self._progress.add_task("", total=1.0)

    def update(self, now: StatusSnapshot) -> None:
        if now.phase not in _STARTING:
            self.close()
            return
        description = f"{now.phase_name} {now.detail}".strip()
        self._progress.update(self._task, description=description, completed=now.progress)
        self._progress.start()

    def close(self) -> None:
        self._progress.stop()


class _ProgressLog:
    """One log line per phase and per tenth of it."""

    def __init__(self) -> None:
        self._log = structlog.get_logger("specpair")
        self._phase: common_pb2.Phase.ValueType | None = None
        self._tenth = 0

    def update(self, now: StatusSnapshot) -> None:
        if now.phase not in _STARTING:
            return
        # Sums of binary fractions may fall just short of a tenth.
        tenth = int(now.progress * 10 + 1e-6)
        if now.phase == self._phase and tenth <= self._tenth:
            return
        self._phase, self._tenth = now.phase, tenth
        detail = {"detail": now.detail} if now.detail else {}
        self._log.info(now.phase_name, progress=round(now.progress, 2), **detail)

    def close(self) -> None:
        """Nothing is left on the screen."""
