"""What Prometheus reads of an engine: its slots, what its thread does, and whether it compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric

from specpair_runtime.slots import SlotPool

__all__ = ["LENGTHS", "SECONDS", "EngineMetrics"]

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Bounds of histograms of seconds, from a small model's step to a long wait for a slot."""

LENGTHS = (*range(9), 12, 16, 24, 32, 48, 63)
"""Bounds of histograms of proposals' lengths, up to that of the widest block."""

_SESSIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


class EngineMetrics:
    """Of one engine. The engine thread tells it of its work; slots and compilations are read when somebody looks.

    Without a registry everything is counted and nobody can read it.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._registry = registry
        seconds = Histogram(
            "specpair_engine_seconds",
            "Seconds of the engine thread, by work: a chunk of a prompt (prefill), or a step of sessions (step).",
            ["work"],
            buckets=SECONDS,
            registry=registry,
        )
        self._prefill, self._step = seconds.labels("prefill"), seconds.labels("step")
        self._sessions = Histogram(
            "specpair_engine_sessions", "Sessions that shared a step.", buckets=_SESSIONS, registry=registry
        )
        self._prefilled = Counter("specpair_prefill_tokens", "Tokens of prompts that were computed.", registry=registry)
        self._waited = Histogram(
            "specpair_slot_wait_seconds",
            "Seconds that a session waited for its slot.",
            buckets=SECONDS,
            registry=registry,
        )

    def waited(self, seconds: float) -> None:
        """A session has got a slot."""
        self._waited.observe(seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A chunk of a prompt has been computed."""
        self._prefill.observe(seconds)
        self._prefilled.inc(tokens)

    def stepped(self, sessions: int, seconds: float) -> None:
        """A step of so many sessions has run."""
        self._step.observe(seconds)
        self._sessions.observe(sessions)

    def watch(self, pool: SlotPool, *, queue: int, recompilations: Callable[[], int]) -> None:
        """From now on the state of a model's slots, for which `queue` sessions may wait, and of its graphs is read."""
        if self._registry is None:
            return
        for name, text, read in (
            ("specpair_slots", "Sessions that the model has room for.", lambda: pool.slots),
            ("specpair_slots_in_use", "Slots that a session holds.", lambda: pool.in_use),
            ("specpair_queue_length", "Sessions that wait for a slot.", lambda: pool.waiting),
            ("specpair_queue_capacity", "Sessions that may wait for a slot.", lambda: queue),
        ):
            Gauge(name, text, registry=self._registry).set_function(read)
        self._registry.register(_Recompilations(recompilations))


class _Recompilations:
    """A counter that somebody else counts."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "specpair_recompilations", "Graphs compiled since the service was ready; 0 is the promise.", self._read()
        )
