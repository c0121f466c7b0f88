"""Shows services on their way to serve: bars on a terminal, a line per phase elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from specpair.messages import Phase
from specpair.rendering import decorated, stderr
from specpair.visible import visible
from specpair.waiting import Sight, Waited

__all__ = ["showing"]


@contextlib.contextmanager
def showing(*, lines: bool = True) -> Iterator[Callable[[Waited, Sight], None]]:
    """What shows a sight of a service on stderr, inside the block; without `lines` on a terminal alone."""
    if decorated(stderr):
        with _Bars(stderr) as bars:
            yield bars.show
    else:
        yield _Lines(stderr).show if lines else lambda one, sight: None


class _Bars:
    """A bar for each service and phase; all disappear at the end. Nothing is shown of services that are ready."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),  # the brackets of an address are none
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[tuple[Waited, Phase | None], TaskID] = {}

    def show(self, one: Waited, sight: Sight) -> None:
        key = one, sight.phase
        for left in [(service, phase) for service, phase in self._tasks if service == one and phase != sight.phase]:
            if left[1] is None:  # nothing was known: there is nothing to be finished
                self._progress.remove_task(self._tasks.pop(left))
            else:
                self._progress.update(self._tasks[left], completed=1.0)
        if sight.phase is Phase.READY:
            return
        if key not in self._tasks:
            self._progress.start()
            self._tasks[key] = self._progress.add_task("", total=1.0 if sight.starting else None)
        description = visible(f"{one.role} {one.address}: {sight}")
        self._progress.update(self._tasks[key], description=description, completed=sight.progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class _Lines:
    """A line when a service enters a phase or begins to do something else."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: dict[Waited, str] = {}

    def show(self, one: Waited, sight: Sight) -> None:
        if sight.phase is Phase.READY and one not in self._said:
            return
        line = f"{one.role} {one.address}: {sight}"
        if self._said.get(one) != line:
            self._said[one] = line
            self._console.print(line)
