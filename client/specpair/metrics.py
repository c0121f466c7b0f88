"""What Prometheus reads of a client: its finished generations, added up (extra `metrics`).

    registry = CollectorRegistry()
    client = SpeculativeClient(target, draft, metrics=ClientMetrics(registry))

The registry is served by whoever has it, for example with `prometheus_client.start_http_server`. Several clients may
share one `ClientMetrics`. A generation is counted once, at its end.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from specpair.results import Stats

__all__ = ["ClientMetrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_LENGTHS = (*range(9), 12, 16, 24, 32, 48, 63)


class ClientMetrics:
    """Counts generations; to be given to clients. May be told by several threads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Registers the metrics. Raises ValueError when the registry has those of another one already."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"specpair_client_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"specpair_client_{name}", text, buckets=buckets, registry=registry)

        self._generations = counter("generations", "Generations that have ended.", "status", "finish")
        self._seconds = histogram("generation_seconds", "Seconds from the call to the last token.", _SECONDS)
        self._first = histogram("first_token_seconds", "Seconds from the call to the first token.", _SECONDS)
        self._tokens = counter("output_tokens", "Tokens of outputs, by who proposed them.", "source")
        self._rounds = counter("rounds", "Steps of the target that were applied, by who proposed.", "source")
        self._proposed = counter("draft_tokens", "Proposed tokens that the target judged, by who proposed.", "source")
        self._accepted = counter("accepted_tokens", "Proposed tokens that became output, by who proposed.", "source")
        self._reached_at = counter(
            "reached_tokens_per_pos", "Proposed tokens behind accepted ones alone, by place in the block.", "position"
        )
        self._accepted_at = counter("accepted_tokens_per_pos", "Accepted tokens, by place in the block.", "position")
        self._lengths = histogram("draft_length", "Proposals of a block, 0 included.", _LENGTHS)
        self._stages = counter(
            "stage_seconds",
            "Seconds of rounds, by stage: waiting for proposals (propose), for the target's engine (queue), its "
            "forward passes (forward), the judgement behind them (judge), and the rest of waiting for verdicts (wire).",
            "stage",
        )
        self._plain = counter(
            "plain_seconds", "Seconds that the target's own steps would have taken without proposals, an estimate."
        )
        self._decoding = counter("decode_seconds", "Seconds that the same tokens took, from the first one on.")
        self._resumes = counter("resumes", "Targets that were lost in a generation, which went on elsewhere.")
        self._losses = counter(
            "draft_losses", "Draft services that were lost or away at the begin, with lookups in their place."
        )
        self._returns = counter("draft_returns", "Draft services that came back in the middle of a generation.")
        self._stale = counter("stale_blocks", "Blocks that the target dropped although they should have continued.")
        self._dropped = counter("dropped_blocks", "Blocks sent ahead on a guess that did not come true, or lost.")

    def record(self, status: str, finish: str, stats: Stats) -> None:
        """A generation has ended, with the name of a gRPC status code and a finish reason, "" if it failed."""
        self._generations.labels(status, finish).inc()
        if stats.output_tokens:
            self._seconds.observe(stats.seconds)
            self._first.observe(stats.time_to_first_token)
        for counter, counts in (
            (self._rounds, stats.rounds_by_source),
            (self._proposed, stats.proposed_by_source),
            (self._accepted, stats.accepted_by_source),
        ):
            for source, count in counts.items():
                counter.labels(source.value).inc(count)
                if counter is self._accepted:
                    self._tokens.labels(source.value).inc(count)
        self._tokens.labels("target").inc(stats.output_tokens - sum(stats.accepted_by_source.values()))
        for places, by_place in (
            (self._reached_at, stats.reached_by_position),
            (self._accepted_at, stats.accepted_by_position),
        ):
            for position, count in enumerate(by_place):
                places.labels(str(position)).inc(count)
        for length, times in stats.draft_lengths.items():
            for _ in range(times):
                self._lengths.observe(length)
        self._record_times(stats)
        self._resumes.inc(stats.resumes)
        self._losses.inc(stats.draft_losses)
        self._returns.inc(stats.draft_returns)
        self._stale.inc(stats.stale)
        self._dropped.inc(stats.dropped)

    def _record_times(self, stats: Stats) -> None:
        for stage, seconds in (
            ("propose", stats.proposing_seconds),
            ("queue", stats.queued_seconds),
            ("forward", stats.verifying_seconds - stats.judging_seconds),
            ("judge", stats.judging_seconds),
            ("wire", stats.wire_seconds),
        ):
            self._stages.labels(stage).inc(max(seconds, 0.0))
        if stats.rounds:
            # A plain step is as wide as any other, and takes as long. The first round is part of both.
            step = stats.verifying_seconds / stats.rounds
            self._plain.inc(step * stats.output_tokens)
            self._decoding.inc(step + max(stats.seconds - stats.time_to_first_token, 0.0))
