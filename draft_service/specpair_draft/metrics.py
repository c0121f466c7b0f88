"""What Prometheus reads of drafting: proposals by who made them, their lengths, and what they took."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from specpair_runtime.engine_metrics import LENGTHS, SECONDS, EngineMetrics
from specpair_runtime.slots import SlotPool

__all__ = ["DraftMetrics"]

# Names of `Source` in the protocol, as labels.
_SOURCES = {2: "model", 3: "ngram"}


class DraftMetrics:
    """Of one draft service. Without a registry everything is counted and nobody can read it.

    `engine` is that of the model's thread.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._registry = registry
        self.engine = EngineMetrics(registry)
        proposals = Counter("specpair_draft_proposals", "Proposals that were sent.", ["source"], registry=registry)
        tokens = Counter("specpair_draft_proposed_tokens", "Tokens of proposals.", ["source"], registry=registry)
        self._by_source = {number: (proposals.labels(name), tokens.labels(name)) for number, name in _SOURCES.items()}
        self._ready = Counter(
            "specpair_draft_ready_proposals",
            "Proposals of the model that were ready when asked for.",
            registry=registry,
        )
        self._lengths = Histogram(
            "specpair_draft_proposal_length", "Tokens of a proposal.", buckets=LENGTHS, registry=registry
        )
        stages = Histogram(
            "specpair_draft_seconds",
            "Seconds of a proposal, by stage: waiting, prefill included (queue), and steps or lookups (draft).",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._queue, self._draft = stages.labels("queue"), stages.labels("draft")

    def proposed(self, source: int, tokens: int, queue_us: int, draft_us: int) -> None:
        """A proposal from a `Source` of the protocol is about to be sent; it took `draft_us` of steps since the ask."""
        proposals, proposed = self._by_source[source]
        proposals.inc()
        proposed.inc(tokens)
        if _SOURCES[source] == "model" and tokens and not draft_us:
            self._ready.inc()
        self._lengths.observe(tokens)
        self._queue.observe(queue_us / 1e6)
        self._draft.observe(draft_us / 1e6)

    def watch_lookups(self, pool: SlotPool) -> None:
        """From now on the sessions of prompt lookup, which need no slot, can be read."""
        if self._registry is not None:
            gauge = Gauge(
                "specpair_lookup_sessions", "Sessions that are answered by prompt lookup.", registry=self._registry
            )
            gauge.set_function(lambda: pool.in_use)
