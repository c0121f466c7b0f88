"""An event loop whose time passes only while all of its tasks wait, and then at once.

So a time limit is reached if, and only if, what it limits waits for longer or for ever, however busy the machine is;
and a test takes as long as its work. What would hang is an error: tasks that wait for one another, a task that goes
round without ever waiting for a time, and one that waits for hours in vain. For what stays in one process and one
thread: to wait for a socket or another thread takes no time of this loop.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["VirtualTimeLoop", "run"]

T = TypeVar("T")

# Rounds of the loop in a row in which some task was ready: no work takes so many, and to count them takes seconds.
_BUSY = 1_000_000
# Seconds of its time that no test needs.
_LONG = 20_000.0


class _Leaping(selectors.DefaultSelector):
    """Waits for nobody: what would have been waited has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0.0
        self._busy = 0
        self._end = _LONG

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._busy = self._busy + 1 if timeout == 0 else 0
        if self._busy > _BUSY:
            self._busy = 0  # whoever ends the tasks gets as far as that
            raise RuntimeError("some task never waits: no time would ever pass")
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise RuntimeError("every task waits, and none of them for a time: this would hang for ever")
        self.passed += max(timeout, 0.0)
        if self.passed > self._end:
            self._end = self.passed + _LONG  # likewise
            raise RuntimeError(f"{self.passed:g} s have passed: some task waits in vain, again and again")
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self._leaping = _Leaping()
        super().__init__(self._leaping)

    def time(self) -> float:
        return self._leaping.passed


def run(work: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work)
