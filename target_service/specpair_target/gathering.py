"""Whether a step waits for sessions that are about to come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specpair_target.lanes import Lane

__all__ = ["Gathering", "StepTimes"]

# Weight of the newest step in the running moments.
_WEIGHT = 0.05
# Share of a step that does not grow with the sessions in it, as long as nothing is known: steps read all weights.
_ASSUMED = 0.5
_LEAST_VARIANCE = 0.05


@dataclass
class StepTimes:
    """Learns how long steps take by the number of slots in them: a running regression line.

    Its intercept, the part of a step that does not depend on how many share it, is what two sessions save by one step
    for both.
    """

    _slots: float = 0.0
    _time: float = 0.0
    _slots_squared: float = 0.0
    _product: float = 0.0
    _intercept: float | None = None

    def stepped(self, slots: int, time_ns: int) -> None:
        """A step over so many slots took so long."""
        weight = _WEIGHT if self._time else 1.0
        self._slots += weight * (slots - self._slots)
        self._time += weight * (time_ns - self._time)
        self._slots_squared += weight * (slots * slots - self._slots_squared)
        self._product += weight * (slots * time_ns - self._product)
        variance = self._slots_squared - self._slots**2
        if variance > _LEAST_VARIANCE:
            slope = (self._product - self._slots * self._time) / variance
            self._intercept = self._time - slope * self._slots

    @property
    def fixed_ns(self) -> float:
        """Time of a step that does not depend on how many slots are in it."""
        if self._intercept is None:
            return _ASSUMED * self._time
        return min(max(self._intercept, 0.0), self._time)


class Gathering:
    """Decides how long the engine, though it could begin a step, waits for more sessions to share it.

    When verdicts go out, the next blocks of their sessions come within a millisecond or so of each other. A step that
    begins with the first of them makes the others wait for all of it and then for their own. One step for all costs
    less than two by the fixed part of a step, so that is how long waiting pays; and only if everybody who is away will
    be back by then, since who comes late waits for the longer step. Where sessions stay away longer than that, two
    groups that take turns are better, each away while the other computes, and nothing waits.
    """

    def __init__(self) -> None:
        self._times = StepTimes()
        self._free_ns = 0

    def stepped(self, slots: int, began_ns: int, ended_ns: int) -> None:
        """A step over so many slots has run."""
        self._times.stepped(slots, ended_ns - began_ns)
        self._free_ns = ended_ns

    def wait_ns(self, away: Sequence[Lane], ready: Sequence[Lane], now_ns: int) -> int:
        """Nanoseconds to wait for the sessions that are `away` before those that are `ready` begin; 0 not to."""
        if not away:
            return 0
        first_ns = min((lane.ready_ns for lane in ready if lane.ready_ns is not None), default=self._free_ns)
        limit_ns = max(first_ns, self._free_ns) + self._times.fixed_ns
        back_ns = [lane.expected_ns for lane in away]
        known = [back for back in back_ns if back is not None and now_ns < back <= limit_ns]
        return max(known) - now_ns if len(known) == len(back_ns) else 0
