"""What a turn counts and times while it runs, for `Stats` and for the pacer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from specpair.loop import Ask, Loop
from specpair.messages import Proposal, Verdict
from specpair.pacing import Round
from specpair.results import ProposerChange, Source, Stats

__all__ = ["Meter"]


class Meter:
    """Starts with the call. `clock` counts seconds from anywhere."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.now = clock
        self.rounds = 0
        """Rounds begun, the current one included."""
        self.cached_tokens = 0
        self._begin = clock()
        self._first: float | None = None
        self._last = self._mark = self._begin
        self._propose_seconds = 0.0
        self._proposing = self._drafting = self._verifying = self._queued = self._wire = 0.0
        self._proposer = "none"
        self._changes: list[ProposerChange] = []

    def use(self, proposer: str) -> None:
        """The turn starts with this proposer."""
        self._proposer = proposer

    def change(self, proposer: str, reason: str) -> None:
        """The turn goes on with another proposer from the current round on."""
        self._proposer = proposer
        self._changes.append(ProposerChange(max(self.rounds, 1), proposer, reason))

    def begin_round(self) -> None:
        """The proposer is about to be asked."""
        self.rounds += 1
        self._mark = self.now()

    def proposal(self, proposal: Proposal | None) -> None:
        """The proposer has answered, or was not asked."""
        self._propose_seconds = self._lap()
        if proposal is not None:
            self._proposing += self._propose_seconds
            self._drafting += proposal.draft_us / 1e6

    def verdict(self, ask: Ask, verdict: Verdict) -> Round:
        """The verdict has come: what the round amounts to for the pacer."""
        seconds = self._lap()
        queued, verifying = verdict.queue_us / 1e6, verdict.forward_us / 1e6
        self._queued += queued
        self._verifying += verifying
        self._wire += max(seconds - queued - verifying, 0.0)
        return Round(ask.max_tokens, verdict.accepted, self._propose_seconds, seconds)

    def tokens(self) -> None:
        """Tokens have just arrived."""
        self._last = self.now()
        if self._first is None:
            self._first = self._last

    def _lap(self) -> float:
        mark, self._mark = self._mark, self.now()
        return self._mark - mark

    def stats(self, loop: Loop | None) -> Stats:
        """Everything so far."""
        if loop is None:
            return Stats(proposer=self._proposer, proposer_changes=tuple(self._changes))
        sources = Counter(token.source for token in loop.tokens)
        del sources[Source.TARGET]
        return Stats(
            rounds=loop.applied,
            proposed=loop.proposed,
            accepted=loop.accepted,
            accepted_by_source=dict(sources),
            stale=loop.stale,
            prompt_tokens=loop.prompt_length,
            cached_tokens=self.cached_tokens,
            output_tokens=len(loop.tokens),
            seconds=self._last - self._begin,
            time_to_first_token=(self._first or self._last) - self._begin,
            proposing_seconds=self._proposing,
            drafting_seconds=self._drafting,
            verifying_seconds=self._verifying,
            queued_seconds=self._queued,
            wire_seconds=self._wire,
            proposer=self._proposer,
            proposer_changes=tuple(self._changes),
        )
