"""How many tokens to ask the draft for: as many as make tokens come fastest. The output never depends on it.

With S(i) the probability that the first i proposed tokens are all accepted, a round with draft length k yields
E(k) = 1 + S(1) + ... + S(k) tokens on average (Leviathan et al. 2023, section 3.1, with the acceptance rate measured
per position) and takes the time to draft k tokens plus the time until the verdict. `GoodputPacer` maximises E(k) over
that time; k = 0 is plain decoding. Everything is computed from what it is told: no clock, no randomness.

A draft that knows how sure it is may end a proposal early. One more id costs the draft c seconds and is worth the
probability that all of the proposal up to it comes true; so a proposal ends where that falls below what c seconds bring
on average, by `Calibration` of the draft's own word for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from specpair.calibration import UNENDING, Calibration
from specpair.results import Source

__all__ = ["FixedPacer", "GoodputPacer", "Mean", "Pacer", "Round"]

# Below this a draft's confidence is noise, and to ask for it is not worth its while.
_LEAST_CONFIDENCE = 0.02
# Plain rounds that are settled at once.
_MOST_IDLE = 256
# A duration counts as at most so many times what was expected: a pause of the machine says nothing of the next round,
# while what has become slower for good is believed after a few.
_SURPRISE = 3.0
# What all positions have in common speaks for one of them as if it had been observed so often there.
_WEIGHT = 2.0
# The acceptance expected of an unknown draft speaks as if it had been observed so often.
_PRIOR = 8.0
# Rounds with a proposal after which no more is spent on trying than usual.
_SURE = 20.0
# Rounds with a proposal in which a draft's confidence is only listened to.
_HEARD = 5
# Rounds with a proposal in a row, when a draft that does not pay is tried again: the first has to catch up.
_TRIAL = 2


@dataclass(frozen=True, slots=True)
class Round:
    """What a block took and brought, as its proposer is told. The seconds of all rounds add up to those of the turn."""

    round: int
    """Of the ask that the block answers."""
    source: Source
    """Who proposed; TARGET if nothing was proposed."""
    asked: int
    """Ids that the proposer meant the block to have: `Proposal.asked`. 0 if it decided for a plain step."""
    proposed: int
    """Ids of the block."""
    accepted: int
    draft_seconds: float
    """From the ask to the proposal, as far as no other block was on its way."""
    verify_seconds: float
    """From the block, or the verdict before it if that came later, to the verdict, the network included."""
    confidence: tuple[float, ...] = ()
    """As in the proposal, for the ids of the block."""
    guessed: bool | None = None
    """Whether block and guess of the target's own token came true as a whole; None if nothing was guessed."""
    forward_seconds: float = 0.0
    """The target's step alone, as it reports it."""

    @property
    def seconds(self) -> float:
        """What the round took."""
        return self.draft_seconds + self.verify_seconds

    @property
    def ended_early(self) -> bool:
        """Whether the draft proposed no more because it was not sure enough."""
        return bool(self.confidence) and self.proposed < self.asked


class Pacer(Protocol):
    """Chooses draft lengths."""

    def draft_length(self, limit: int) -> int:
        """Ids to ask for in the next round, from 0 to `limit`."""
        ...

    def idle(self) -> int:
        """After a length of 0: for how many rounds more it will be 0."""
        ...

    @property
    def min_confidence(self) -> float:
        """Where a proposal of the next round should end early, as in `DraftAsk`; 0 for nowhere."""
        ...

    def observe(self, round: Round) -> None:
        """Learns from a round."""
        ...


class FixedPacer:
    """Always the same draft length, never ended early."""

    min_confidence = 0.0

    def __init__(self, length: int) -> None:
        self._length = length

    def draft_length(self, limit: int) -> int:
        return min(self._length, limit)

    def idle(self) -> int:
        return 0 if self._length else _MOST_IDLE

    def observe(self, round: Round) -> None:
        pass


class GoodputPacer:
    """The draft length with the highest measured goodput.

    `memory` is the number of rounds after which an observation has lost two thirds of its weight. Every
    `explore_every` rounds a neighbour of the best length is tried, so that its cost and its acceptance stay known.
    While the best length is 0, the best other one is tried so often that it costs the share `idle_budget` of the time:
    often while it is nearly as good, rarely if the draft is useless.
    """

    def __init__(
        self,
        *,
        start: int = 4,
        acceptance: float = 0.7,
        memory: float = 40.0,
        explore_every: int = 16,
        idle_budget: float = 0.006,
    ) -> None:
        self._start = start
        self._keep = 1.0 - 1.0 / memory
        self._explore_every = explore_every
        self._idle_budget = idle_budget
        # For position i of a proposal: how often it was asked for and drafted, and how often all before it had been
        # accepted and it was too. The acceptance is pooled over the positions, and speaks for those not yet tried.
        self._positions: list[_Position] = []
        self._pooled_reached, self._pooled_accepted = _PRIOR, _PRIOR * acceptance
        self._speculated = 0
        self._draft_cost = _Line(self._keep)
        # Rounds with a proposal and plain ones take their own times: plain steps go ahead of verdicts without a risk.
        self._verify_seconds, self._plain_seconds = Mean(self._keep), Mean(self._keep)
        self._forward_seconds = Mean(self._keep)
        self._calibration = Calibration(keep=self._keep)
        self._goodput = 0.0
        self._rounds = 0
        self._idle = self._patience = self._trial = 0
        # What a draft takes longer when it was not asked for a while, and has tokens to read first.
        self._catch_up = Mean(self._keep)

    def draft_length(self, limit: int) -> int:
        self._rounds += 1
        if limit <= 0:
            return 0
        if not self._draft_cost.known or not self._verify_seconds.known:
            return min(self._start, limit)
        best, gain = self._best(limit)
        if gain <= 0.0 and self._speculated < _SURE:
            # A few rejections say little: as long as the acceptance may well be one that pays, knowing is worth more.
            best, gain = self._best(limit, doubt=1.0)
        if gain <= 0.0:
            if self._trial > 0:
                return best
            # Little is known at first, and much is at stake: then it is worth more to know.
            budget = self._idle_budget * max(1.0, _SURE / (self._speculated + 1))
            loss = self._catch_up.value / max(self._plain_seconds.value, 1e-9) - gain * _TRIAL
            self._patience = int(loss / budget)
            if self._idle < self._patience:
                return 0
            self._trial = _TRIAL
            return best
        if self._rounds % self._explore_every == 0:
            up = self._rounds // self._explore_every % 2 == 0
            return min(best + 1, limit) if up else max(best - 1, 1)
        return best

    def idle(self) -> int:
        return min(max(self._patience - self._idle, 0), _MOST_IDLE)

    @property
    def min_confidence(self) -> float:
        # The id that is looked at has been drafted already. What ends with it is the id and those behind it, of which
        # the next one would be worth about as much, times the rate of acceptance.
        worth = self._draft_cost.slope * self._goodput / (1.0 + self._pooled)
        if worth < _LEAST_CONFIDENCE:
            return 0.0
        # A draft's own word is not believed before it was heard a few times.
        return self._calibration.confidence_for(worth) if self._speculated >= _HEARD else UNENDING

    def observe(self, round: Round) -> None:
        self._forward_seconds.add(round.forward_seconds)
        if round.asked == 0:
            self._plain_seconds.add(_bounded(round.seconds, self._plain_seconds.value))
            self._idle += 1
            return
        self._verify_seconds.add(_bounded(round.verify_seconds, self._verify_seconds.value))
        rested, self._idle = self._idle > 0, 0
        self._trial = max(self._trial - 1, 0)
        self._speculated += 1
        ended_early = round.ended_early
        drafted = round.proposed + 1 if ended_early else round.asked
        usual = self._draft_cost.at(drafted)
        if rested and self._draft_cost.known:
            self._catch_up.add(max(round.draft_seconds - usual, 0.0))
        else:
            self._draft_cost.add(drafted, _bounded(round.draft_seconds, usual))
        self._calibration.observe(round.confidence, round.accepted)
        self._pooled_reached *= self._keep
        self._pooled_accepted *= self._keep
        self._positions.extend(_Position() for _ in range(round.asked - len(self._positions)))
        for i, position in enumerate(self._positions[: round.asked]):
            reached, accepted = i <= round.accepted, i < round.accepted
            position.observe(self._keep, i < drafted, reached, accepted)
            # An id that was not proposed for want of confidence was not rejected, though it brought nothing either.
            # One that the draft did not have counts as rejected: what matters is what asking for it brings.
            if reached and not (ended_early and i >= round.proposed):
                self._pooled_reached += 1.0
                self._pooled_accepted += accepted

    def _best(self, limit: int, *, doubt: float = 0.0) -> tuple[int, float]:
        """The k >= 1 with the most expected tokens per second, and what a round of it gains over plain decoding.

        The gain is in tokens: those of the round less those that plain decoding would have made in its time. Acceptance
        is taken to be higher than observed by `doubt` standard deviations of what was observed.
        """
        verify = max(self._verify_seconds.value, 1e-9)
        # Before plain steps were tried they may be as quick as the target is.
        plain = self._plain_seconds.value or self._forward_seconds.value or verify
        pooled = self._pooled
        better = doubt * (pooled * (1.0 - pooled) / self._pooled_reached) ** 0.5
        expected, survival, drafted = 1.0, 1.0, 0.0
        best, best_goodput, gain = 0, 0.0, 0.0
        for i in range(limit):
            position = self._positions[i] if i < len(self._positions) else _Position()
            survival *= min((position.accepted + _WEIGHT * pooled) / (position.reached + _WEIGHT) + better, 1.0)
            expected += survival
            drafted += (position.drafted + _WEIGHT) / (position.asked + _WEIGHT)
            steps = (self._draft_cost.at(drafted) + verify) / plain
            if expected / steps > best_goodput:
                best, best_goodput, gain = i + 1, expected / steps, expected - steps
        self._goodput = max(best_goodput, 1.0) / plain
        return best, gain

    @property
    def _pooled(self) -> float:
        return self._pooled_accepted / self._pooled_reached


def _bounded(seconds: float, expected: float) -> float:
    return min(seconds, _SURPRISE * expected) if expected > 0.0 else seconds


class _Position:
    """Counts for one position of a proposal, which forget."""

    __slots__ = ("accepted", "asked", "drafted", "reached")

    def __init__(self) -> None:
        self.asked = self.drafted = self.reached = self.accepted = 0.0

    def observe(self, keep: float, drafted: bool, reached: bool, accepted: bool) -> None:
        self.asked = self.asked * keep + 1.0
        self.drafted = self.drafted * keep + drafted
        if reached:
            self.reached = self.reached * keep + 1.0
            self.accepted = self.accepted * keep + accepted


class Mean:
    """A mean that forgets: an observation's weight falls by `keep` with every later one."""

    def __init__(self, keep: float, value: float = 0.0, weight: float = 0.0) -> None:
        """It starts as if `weight` observations of `value` had been made."""
        self._keep = keep
        self._weight = weight
        self._sum = value * weight

    @property
    def known(self) -> bool:
        return self._weight > 0.0

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    def add(self, value: float) -> None:
        self._weight = self._weight * self._keep + 1.0
        self._sum = self._sum * self._keep + value


class _Line:
    """A line through what was observed, by least squares that forget: seconds for k tokens."""

    def __init__(self, keep: float) -> None:
        self._x, self._y, self._xx, self._xy = (Mean(keep) for _ in range(4))

    @property
    def known(self) -> bool:
        return self._x.known

    def add(self, x: float, y: float) -> None:
        self._x.add(x)
        self._y.add(y)
        self._xx.add(x * x)
        self._xy.add(x * y)

    @property
    def slope(self) -> float:
        """Seconds for one token more."""
        mean_x, mean_y = self._x.value, self._y.value
        variance = self._xx.value - mean_x * mean_x
        proportional = mean_y / mean_x if mean_x else 0.0
        # With too little spread in x the slope is noise: then all of the time is the tokens'. Neither a negative slope
        # nor a negative start makes sense.
        slope = (self._xy.value - mean_x * mean_y) / variance if variance > 0.05 else proportional
        return min(max(slope, 0.0), proportional)

    def at(self, x: float) -> float:
        return self._y.value + self.slope * (x - self._x.value)
