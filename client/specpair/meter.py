"""What a turn counts and times while it runs, for `Stats` and for those who choose lengths by it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from specpair.loop import Loop, Sent
from specpair.messages import Block, Proposal, Verdict
from specpair.pacing import Round
from specpair.results import ProposerChange, Source, Stats

__all__ = ["Meter", "Trip"]


@dataclass(frozen=True, slots=True)
class Trip:
    """The ways of a block that was sent while no other one was under way. In seconds."""

    draft_seconds: float
    """From the ask to the proposal."""
    engine_seconds: float
    """At the target, as it reports it."""
    seconds: float
    """From the block to the verdict."""


@dataclass(frozen=True, slots=True)
class _Times:
    asked: float
    sent: float
    alone: bool


class Meter:
    """Starts with the call. `clock` counts seconds from anywhere."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.now = clock
        self.round = 1
        """Of the turn, counted from 1, as far as no block is dropped."""
        self.cached_tokens = 0
        self.resumes = 0
        """How often the target was lost and the turn went on."""
        self._begin = clock()
        self._first: float | None = None
        self._last = self._asked = self._resumed = self._begin
        self._times: dict[int, _Times] = {}
        self._proposing = self._drafting = self._verifying = self._judging = self._queued = self._wire = 0.0
        self._lengths: Counter[int] = Counter()
        self._sources: Counter[Source] = Counter()
        self._proposed: Counter[Source] = Counter()
        self._reached: Counter[int] = Counter()
        self._accepted: Counter[int] = Counter()
        self._proposer = "none"
        self._changes: list[ProposerChange] = []

    def use(self, proposer: str) -> None:
        """The turn starts with this proposer."""
        self._proposer = proposer

    def change(self, proposer: str, reason: str) -> None:
        """The turn goes on with another proposer from the current round on."""
        self._proposer = proposer
        self._changes.append(ProposerChange(self.round, proposer, reason))

    @property
    def elapsed(self) -> float:
        """Seconds since the call."""
        return self.now() - self._begin

    def resumed(self) -> None:
        """The caller has taken what there was: from here on the turn's time is its own."""
        self._resumed = self.now()

    def asking(self, round: int) -> None:
        """The proposer is about to be asked, for this round of the turn."""
        self.round = round
        self._asked = self.now()

    def answered(self, proposal: Proposal) -> None:
        """The proposer has answered."""
        self._drafting += proposal.draft_us / 1e6

    def sending(self, block: Block, *, alone: bool) -> None:
        """A block is about to be sent, behind others or while no other one is under way."""
        for behind in range(1 + block.more_steps):
            self._times[block.round + behind] = _Times(self._asked, self.now(), alone)

    def verdict(self, sent: Sent, verdict: Verdict) -> tuple[Round, Trip | None]:
        """The verdict on a block has just come: what the round amounts to, and what its ways took."""
        times = self._times[sent.block.round]
        self._times = {round: later for round, later in self._times.items() if round > sent.block.round}
        queued, verifying = verdict.queue_us / 1e6, verdict.forward_us / 1e6
        self._last = self.now()
        if self._first is None:
            self._first = self._last
        proposing = max(times.sent - max(times.asked, self._resumed), 0.0)
        waiting = self._last - max(times.sent, self._resumed)
        self._proposing += proposing
        self._queued += queued
        self._verifying += verifying
        self._judging += verdict.judge_us / 1e6
        self._wire += max(waiting - queued - verifying, 0.0)
        self._count(sent, verdict)
        proposal = sent.proposal
        round = Round(
            round=sent.block.round,
            source=sent.block.source,
            asked=proposal.asked if proposal is not None else 0,
            proposed=len(sent.block.token_ids),
            accepted=verdict.accepted,
            draft_seconds=proposing,
            verify_seconds=waiting,
            confidence=proposal.confidence[: len(sent.block.token_ids)] if proposal is not None else (),
            guessed=None if sent.guess is None else sent.comes_true(verdict.committed),
            forward_seconds=verifying,
        )
        if not times.alone:
            return round, None
        return round, Trip(times.sent - times.asked, queued + verifying, self._last - times.sent)

    def token(self) -> None:
        """Tokens have just arrived, without a block."""
        self._last = self.now()
        if self._first is None:
            self._first = self._last

    def _count(self, sent: Sent, verdict: Verdict) -> None:
        length = len(sent.block.token_ids)
        self._lengths[length] += 1
        self._sources[sent.block.source] += 1
        if length:
            self._proposed[sent.block.source] += length
        self._reached.update(range(min(verdict.accepted + 1, length)))
        self._accepted.update(range(verdict.accepted))

    def stats(self, loop: Loop | None) -> Stats:
        """Everything so far."""
        if loop is None:
            return Stats(proposer=self._proposer, proposer_changes=tuple(self._changes))
        sources = Counter(token.source for token in loop.tokens)
        del sources[Source.TARGET]
        positions = range(len(self._reached))
        return Stats(
            rounds=loop.applied,
            rounds_by_source=dict(self._sources),
            proposed=loop.proposed,
            proposed_by_source=dict(self._proposed),
            accepted=loop.accepted,
            accepted_by_source=dict(sources),
            draft_lengths=dict(sorted(self._lengths.items())),
            reached_by_position=tuple(self._reached[i] for i in positions),
            accepted_by_position=tuple(self._accepted[i] for i in positions),
            stale=loop.stale,
            dropped=loop.dropped,
            prompt_tokens=loop.prompt_length,
            cached_tokens=self.cached_tokens,
            output_tokens=len(loop.tokens),
            seconds=self._last - self._begin,
            time_to_first_token=(self._first or self._last) - self._begin,
            proposing_seconds=self._proposing,
            drafting_seconds=self._drafting,
            verifying_seconds=self._verifying,
            judging_seconds=self._judging,
            queued_seconds=self._queued,
            wire_seconds=self._wire,
            resumes=self.resumes,
            proposer=self._proposer,
            proposer_changes=tuple(self._changes),
        )
