"""What Prometheus reads of verification: what blocks brought, and where a round's time goes.

Everything about acceptance follows from one table, how often a block of a source with so many proposals had so many of
them accepted: a verdict costs one addition, and the rest is arithmetic when somebody looks.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from specpair_runtime.engine_metrics import LENGTHS, SECONDS, EngineMetrics
from specpair_target.blocks import Answer, Stale

__all__ = ["StreamMetrics", "VerifyMetrics"]

# Names of `Source` in the protocol, as labels. A client can send any other number.
_SOURCES = {1: "target", 2: "model", 3: "ngram", 4: "prediction"}
_OTHER = "other"

_Table = dict[tuple[str, int, int], int]
"""How often a block of (source, proposed, accepted) was judged."""


class VerifyMetrics:
    """Of one target. Without a registry everything is counted and nobody can read it. `engine` is the engine's own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.engine = EngineMetrics(registry)
        self.blocks: Tally[tuple[str, int, int]] = Tally()
        stages = Histogram(
            "specpair_round_seconds",
            "Seconds of a block, by stage: waiting for the engine (queue), the forward pass (forward), the judgement "
            "behind it (judge), and from a verdict until the session sends its next block (away).",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.queue, self.forward = stages.labels("queue"), stages.labels("forward")
        self.judge, self.away = stages.labels("judge"), stages.labels("away")
        output = Counter(
            "specpair_output_tokens", "Tokens that became part of an output, by method.", ["method"], registry=registry
        )
        self.verified, self.generated = output.labels("Verify"), output.labels("Generate")
        self.stale = Counter(
            "specpair_stale_blocks", "Blocks that did not continue their session and were dropped.", registry=registry
        )
        self._turns = Counter("specpair_turns", "Turns of sessions that have begun.", registry=registry)
        self._resumed = Counter(
            "specpair_resumed_turns", "Turns that began with tokens of an earlier stream.", registry=registry
        )
        self._prompt = Counter("specpair_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter(
            "specpair_cached_prompt_tokens", "Those that an earlier turn had left in the slot.", registry=registry
        )
        if registry is not None:
            registry.register(_Acceptance(self.blocks))

    def began(self, *, prompt_tokens: int, cached_tokens: int = 0, committed_tokens: int = 0) -> None:
        """A turn has begun."""
        self._turns.inc()
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)
        if committed_tokens:
            self._resumed.inc()


class StreamMetrics:
    """Of one stream of blocks; lives on the event loop."""

    def __init__(self, metrics: VerifyMetrics) -> None:
        self._all = metrics
        self._owed = 0
        self._answered: float | None = None

    def submitted(self, blocks: int) -> None:
        """The client has sent so many blocks more."""
        if self._answered is not None:
            self._all.away.observe(time.perf_counter() - self._answered)
            self._answered = None
        self._owed += blocks

    def answered(self, source: int, proposed: int, accepted: int, answer: Answer) -> None:
        """A block of `proposed` ids from a `Source` of the protocol is answered; `accepted` became output."""
        self._owed -= 1
        if isinstance(answer, Stale):
            self._all.stale.inc()
            return
        self._all.blocks[_SOURCES.get(source, _OTHER), proposed, accepted] += 1
        self._all.verified.inc(len(answer.commit.token_ids))
        self._all.queue.observe(answer.queue_us / 1e6)
        self._all.forward.observe((answer.judgement.forward_us - answer.judgement.judge_us) / 1e6)
        self._all.judge.observe(answer.judgement.judge_us / 1e6)
        if not self._owed and not answer.commit.finish_reason:
            self._answered = time.perf_counter()


class _Acceptance:
    """The table of blocks, as the counters of it that people know."""

    def __init__(self, blocks: _Table) -> None:
        self._blocks = blocks

    def collect(self) -> Iterator[Metric]:
        # A copy, made in one go: the event loop goes on counting.
        table = dict(self._blocks)
        yield _by_source("specpair_rounds", "Blocks that were judged, those without proposals included.", table)
        drafts = {block: times for block, times in table.items() if block[1]}
        proposed = {block: times * block[1] for block, times in drafts.items()}
        accepted = {block: times * block[2] for block, times in drafts.items()}
        name = "specpair_spec_decode_num"
        yield _by_source(f"{name}_drafts", "Blocks with proposals.", drafts)
        yield _by_source(f"{name}_draft_tokens", "Proposed tokens that were judged.", proposed)
        yield _by_source(f"{name}_accepted_tokens", "Proposed tokens that became part of an output.", accepted)
        reached, kept = _places(drafts)
        yield _by_position(
            f"{name}_reached_tokens_per_pos",
            "Proposed tokens behind accepted ones alone, by place in the block.",
            reached,
        )
        yield _by_position(f"{name}_accepted_tokens_per_pos", "Accepted tokens, by place in the block.", kept)
        yield _histogram("specpair_draft_length", "Proposals of a block, 0 included.", _sums(table, 1))
        yield _histogram("specpair_acceptance_length", "Accepted proposals of a block that had some.", _sums(drafts, 2))


def _places(drafts: _Table) -> tuple[Tally[int], Tally[int]]:
    """By place in a block, from 0 on: how often all before it were accepted, and how often it was accepted too."""
    all_of, refused = _sums(drafts, 2), Tally[int]()
    for (_, proposed, accepted), times in drafts.items():
        if accepted < proposed:
            refused[accepted] += times
    reached: Tally[int] = Tally()
    kept: Tally[int] = Tally()
    beyond = 0
    for place in range(max((proposed for _, proposed, _ in drafts), default=0) - 1, -1, -1):
        beyond += all_of[place + 1]
        kept[place] = beyond
        reached[place] = beyond + refused[place]
    return reached, kept


def _by_source(name: str, text: str, counts: _Table) -> CounterMetricFamily:
    sums: Tally[str] = Tally()
    for (source, _, _), count in counts.items():
        sums[source] += count
    family = CounterMetricFamily(name, text, labels=["source"])
    for source, total in sorted(sums.items()):
        family.add_metric([source], total)
    return family


def _by_position(name: str, text: str, counts: Tally[int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=["position"])
    for position, count in sorted(counts.items()):
        family.add_metric([str(position)], count)
    return family


def _sums(table: _Table, part: int) -> Tally[int]:
    """How often the second or third part of a block's key had a value."""
    sums: Tally[int] = Tally()
    for block, times in table.items():
        sums[(0, block[1], block[2])[part]] += times
    return sums


def _histogram(name: str, text: str, counts: Tally[int]) -> HistogramMetricFamily:
    buckets = [
        (str(float(bound)), float(sum(times for length, times in counts.items() if length <= bound)))
        for bound in LENGTHS
    ]
    buckets.append(("+Inf", float(counts.total())))
    family = HistogramMetricFamily(name, text)
    family.add_metric([], buckets, float(sum(length * times for length, times in counts.items())))
    return family
