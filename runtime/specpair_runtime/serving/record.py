"""What a handler says of its call, for the call's log line and its trace."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["CallRecord", "Stopwatch", "Value", "annotate", "annotate_at_end", "stage", "timed"]

Value = str | int | float | bool

# Laps that are kept one by one; behind them only their sum goes on.
_LAPS = 8


class Stopwatch:
    """How long something took, that may happen several times. Another thread may stop it than has started it."""

    def __init__(self) -> None:
        self.laps: deque[tuple[int, int]] = deque(maxlen=_LAPS)
        """Begin and end of the latest, in nanoseconds of `time.perf_counter_ns`."""
        self._total_ns = 0
        self._began_ns: int | None = None

    @property
    def seconds(self) -> float:
        """The sum of all that have ended."""
        return self._total_ns / 1e9

    def start(self) -> None:
        """It begins; it may have begun already."""
        if self._began_ns is None:
            self._began_ns = time.perf_counter_ns()

    def stop(self) -> None:
        """It ends, if it has begun."""
        if self._began_ns is not None:
            began_ns, self._began_ns = self._began_ns, None
            now_ns = time.perf_counter_ns()
            self._total_ns += now_ns - began_ns
            self.laps.append((began_ns, now_ns))


class CallRecord:
    """What is said of one call: counts, durations and names only. No prompt, no generated text, no token ids."""

    def __init__(self) -> None:
        self.stages: dict[str, Stopwatch] = {}
        self._fields: dict[str, Value] = {}
        self._later: list[Callable[[], Mapping[str, Value]]] = []

    @classmethod
    def open(cls) -> CallRecord:
        """A record for the current call. To be called before its handler."""
        record = cls()
        _current.set(record)
        return record

    def annotate(self, fields: Mapping[str, Value]) -> None:
        """Adds fields, or replaces those of the same name."""
        self._fields.update(fields)

    def annotate_at_end(self, fields: Callable[[], Mapping[str, Value]]) -> None:
        """Adds fields that are asked for when the call ends, whichever way it does."""
        self._later.append(fields)

    def fields(self) -> dict[str, Value]:
        """Everything that was said, as it is now; stages as `NAME_seconds`."""
        found = dict(self._fields)
        for later in self._later:
            found.update(later())
        return {**found, **{f"{name}_seconds": round(watch.seconds, 6) for name, watch in self.stages.items()}}


# grpc.aio runs every call in a task of its own, so nothing has to be unset.
_current: ContextVar[CallRecord | None] = ContextVar("record", default=None)


def annotate(**fields: Value) -> None:
    """Adds fields to the record of the current call; does nothing outside of one.

    Counts, durations and names only: no prompt, no generated text, no token ids.
    """
    if (record := _current.get()) is not None:
        record.annotate(fields)


def annotate_at_end(fields: Callable[[], Mapping[str, Value]]) -> None:
    """Adds what `fields` returns when the current call ends; does nothing outside of one."""
    if (record := _current.get()) is not None:
        record.annotate_at_end(fields)


def stage(name: str, watch: Stopwatch) -> None:
    """Adds a part of the current call that `watch` times until the call ends; does nothing outside of one."""
    if (record := _current.get()) is not None:
        record.stages[name] = watch


@contextmanager
def timed(name: str) -> Iterator[None]:
    """What happens inside is such a part."""
    watch = Stopwatch()
    stage(name, watch)
    watch.start()
    try:
        yield
    finally:
        watch.stop()
