"""Memory, threads and file descriptors of processes over time, and whether they stay flat."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
from scipy import stats

METRICS = ("rss_mib", "threads", "fds")
# What a metric may grow by over a whole run for reasons that do not go on: caches, pollers, connections of the moment.
_FLOOR = {"rss_mib": 16.0, "threads": 3.0, "fds": 8.0}
# And how much more where it swings by itself: multiples of its residuals' standard deviation.
_SIGMAS = 2.0
# Memory of a process that has just begun grows; below so many seconds it says nothing.
_LEAST_SECONDS = {"rss_mib": 600.0, "threads": 0.0, "fds": 0.0}
_WARM_UP = 0.2


@dataclass
class Life:
    """What was measured of one process."""

    pid: int
    seconds: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {metric: [] for metric in METRICS})

    def measure(self) -> None:
        """Adds a sample; none of a process that is gone."""
        try:
            process = psutil.Process(self.pid)
            with process.oneshot():
                now = (process.memory_info().rss / 2**20, process.num_threads(), process.num_fds())
        except psutil.Error:
            return
        if not now[0]:  # it has been killed, and nobody has waited for it yet
            return
        self.seconds.append(time.monotonic())
        for metric, value in zip(METRICS, now, strict=True):
            self.values[metric].append(float(value))

    def last(self) -> dict[str, float]:
        """The newest sample."""
        return {metric: round(values[-1], 1) for metric, values in self.values.items() if values}


@dataclass(frozen=True)
class Trend:
    """How one metric of one process went, behind its warm-up."""

    metric: str
    median: float
    per_hour: float
    growth: float
    allowed: float
    seconds: float

    @property
    def judged(self) -> bool:
        """Whether the time was long enough to tell."""
        return self.seconds >= _LEAST_SECONDS[self.metric]

    @property
    def flat(self) -> bool:
        """Whether it grew by no more than its noise explains."""
        return self.growth <= self.allowed

    def summary(self) -> dict[str, Any]:
        """As plain data."""
        numbers = {"median": self.median, "per_hour": self.per_hour, "growth": self.growth, "allowed": self.allowed}
        return {**{name: round(value, 2) for name, value in numbers.items()}, "flat": self.flat, "judged": self.judged}


def trends(life: Life) -> list[Trend]:
    """The slope of each metric by Theil and Sen, which single peaks do not move, and what it amounts to."""
    skipped = int(len(life.seconds) * _WARM_UP)
    seconds = life.seconds[skipped:]
    if len(seconds) < 3:
        return []
    return [_trend(metric, seconds, life.values[metric][skipped:]) for metric in METRICS]


def _trend(metric: str, seconds: Sequence[float], values: Sequence[float]) -> Trend:
    slope, level, _, _ = stats.theilslopes(values, seconds)
    residuals = [value - level - slope * second for second, value in zip(seconds, values, strict=True)]
    window = seconds[-1] - seconds[0]
    return Trend(
        metric,
        median=statistics.median(values),
        per_hour=float(slope) * 3600,
        growth=float(slope) * window,
        allowed=_FLOOR[metric] + _SIGMAS * statistics.pstdev(residuals),
        seconds=window,
    )
