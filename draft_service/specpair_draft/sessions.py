"""One session with the draft model, as the engine thread knows it: what it wants next, and what is ready for it."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum

from specpair.errors import SpecpairError
from specpair_draft.asks import Ask, Deliver, Proposal, Timed, Turn
from specpair_draft.path import Path
from specpair_runtime.models.runner import ModelRunner
from specpair_runtime.sampling.history import TokenHistory
from specpair_runtime.sampling.params import SamplingParams
from specpair_runtime.serving import Stopwatch

__all__ = ["Level", "Session"]


class Level(IntEnum):
    """What a session's next guess is for; the lowest goes first."""

    ASKED = 0
    """The proposal that an ask waits for."""
    PUSHED = 1
    """A further proposal of an ask."""
    AHEAD = 2
    """An ask that may come."""


@dataclass
class _Round:
    """An ask that is being answered: the proposal at hand begins at `start`; its times count from `since_ns` on."""

    ask: Ask
    deliver: Deliver
    start: int
    since_ns: int
    index: int = 0
    forward_ns: int = 0


class Session:
    """A session on one slot. The engine thread alone touches it, but for `closed`."""

    def __init__(self, slot: int, max_length: int, *, stop_ids: Collection[int] = (), run_ahead: bool = True) -> None:
        """`stop_ids` are the ids that the model ends a sequence with."""
        self.slot = slot
        self.path = Path(max_length)
        self.closed = False
        self.failure: SpecpairError | None = None
        self.prefill = Stopwatch()
        """From tokens waiting for more than a step until they are in the slot, other sessions' turns included."""
        self._turn = Turn((), 0)
        self._stop_ids = stop_ids
        self._run_ahead = run_ahead
        self._history: TokenHistory | None = None
        self._round: _Round | None = None
        # Whether guesses are made with their confidence, and the length of the path up to which some are made unasked.
        self._confident = False
        self._reach = 0

    @property
    def params(self) -> SamplingParams:
        """The turn's parameters."""
        return self._turn.params

    @property
    def samples_by_rejection(self) -> bool:
        """Whether guesses are a draft's own samples, of which the distributions are kept."""
        return self.params.rejection and not self.params.greedy

    @property
    def confident(self) -> bool:
        """Whether guesses come with their confidence, as the last ask wanted."""
        return self._confident

    @property
    def complete(self) -> bool:
        """Whether the proposal at hand is ready."""
        return self._round is not None and self._ready(self._round) is not None

    @property
    def level(self) -> Level | None:
        """What the next guess is for; None if none is wanted now."""
        if self._round is not None:
            return Level.ASKED if self._round.index == 0 else Level.PUSHED
        return Level.AHEAD if len(self.path.ids) < self._reach else None

    @property
    def wanted(self) -> int:
        """Guesses until that is reached, at least 1 where there is a level."""
        if self._round is None:
            return self._reach - len(self.path.ids)
        known = max(len(self.path.ids) - self._round.start, 0)
        return min(self._round.ask.max_tokens, self.path.end - self._round.start) - known

    def begin(self, turn: Turn) -> None:
        """Starts a turn; the KV of what it shares with the last one stays. Ends what was asked."""
        self._round, self._reach = None, 0
        self._turn = turn
        self._follow(0, turn.token_ids)
        self.path.forget_guesses()
        self._history = None

    def take(self, ask: Ask, deliver: Deliver, queued_ns: int) -> None:
        """Follows the target and answers an ask from now on; `queued_ns` is when it came. Ends the ask before it."""
        self._follow(ask.from_position, ask.token_ids)
        self._confident = ask.min_confidence > 0
        if self._confident and not self.path.confident:
            self.path.forget_guesses()
        self._round = _Round(ask, deliver, ask.base_length, queued_ns)

    def settle(self) -> None:
        """Delivers every proposal that is ready."""
        while (round_ := self._round) is not None and (count := self._ready(round_)) is not None:
            now = time.perf_counter_ns()
            proposal = self._proposal(round_, count)
            waited_ns = max(now - round_.since_ns - round_.forward_ns, 0)
            timed = Timed(round_.index, round_.start, proposal, waited_ns // 1000, round_.forward_ns // 1000)
            round_.start += count
            round_.index += 1
            round_.since_ns, round_.forward_ns = now, 0
            if round_.index >= round_.ask.proposals:
                self._round = None
                self._look_ahead(round_)
            round_.deliver(timed)

    def spend(self, forward_ns: int) -> None:
        """Notes the time of steps in which the session took part."""
        if self._round is not None:
            self._round.forward_ns += forward_ns

    def fail(self, error: SpecpairError) -> None:
        """Answers what is asked with an error. What was only done ahead is given up until somebody asks for it."""
        round_, self._round, self._reach = self._round, None, 0
        if round_ is not None:
            self.failure = error
            round_.deliver(error)

    def history(self, runner: ModelRunner) -> TokenHistory:
        """The committed tokens, for penalties and their like."""
        if self._history is None:
            self._history = TokenHistory(
                self.params,
                self.path.tokens[: self._turn.prompt_length],
                self._stop_ids,
                runner.vocabulary,
                runner.device,
            )
        self._history.extend(self.path.tokens[self._history.length :])
        return self._history

    def _follow(self, from_position: int, token_ids: Collection[int]) -> None:
        self.path.follow(from_position, list(token_ids))
        if self._history is not None and self._history.length > from_position:
            self._history = None

    def _look_ahead(self, round_: _Round) -> None:
        """As far as two rounds like this one go whose proposals come true, with a token of the target's behind each."""
        if self._run_ahead and self.path.fits:
            self._reach = min(round_.start + 2 * round_.ask.max_tokens + 2, self.path.end)

    def _ready(self, round_: _Round) -> int | None:
        """The length of the proposal at hand; None if it is not there yet."""
        path, start = self.path, round_.start
        most = max(min(round_.ask.max_tokens, path.end - start), 0)
        known = min(max(len(path.ids) - start, 0), most)
        if round_.ask.min_confidence > 0 and known > 0:
            probability = 1.0
            for count, confidence in enumerate(path.confidence(start, start + known)):
                probability *= confidence
                if probability < round_.ask.min_confidence:
                    # The rejection rule must not leave out a sample for what it is: that would change the distribution.
                    # There the id is the last one of its proposal.
                    return count + 1 if self.samples_by_rejection else max(count, 1)
        return most if known >= most else None

    def _proposal(self, round_: _Round, count: int) -> Proposal:
        path, start, stop = self.path, round_.start, round_.start + count
        return Proposal(
            path.ids[start:stop] if count else [],
            path.probs(start, stop) if self.samples_by_rejection and count else [],
            path.confidence(start, stop) if round_.ask.min_confidence > 0 and count else [],
        )
