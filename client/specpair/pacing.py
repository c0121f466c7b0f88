"""How many tokens to ask the draft for: as many as make tokens come fastest. The output never depends on it.

With S(i) the probability that the first i proposed tokens are all accepted, a round with draft length k yields
E(k) = 1 + S(1) + ... + S(k) tokens on average (Leviathan et al. 2023, section 3.1, with the acceptance rate measured
per position) and takes the time to draft k tokens plus the time until the verdict. `GoodputPacer` maximises E(k) over
that time; k = 0 is plain decoding. Everything is computed from what it is told: no clock, no randomness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["FixedPacer", "GoodputPacer", "Pacer", "Round"]


@dataclass(frozen=True, slots=True)
class Round:
    """What a round took and brought."""

    asked: int
    """Ids asked for; 0 if the draft was not asked."""
    accepted: int
    draft_seconds: float
    """From the ask to the proposal."""
    verify_seconds: float
    """From the block to the verdict, the network included."""


class Pacer(Protocol):
    """Chooses draft lengths."""

    def draft_length(self, limit: int) -> int:
        """Ids to ask for in the next round, from 0 to `limit`."""
        ...

    def observe(self, round: Round) -> None:
        """Learns from a round."""
        ...


class FixedPacer:
    """Always the same draft length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def draft_length(self, limit: int) -> int:
        return min(self._length, limit)

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
        idle_budget: float = 0.01,
    ) -> None:
        self._start = start
        self._keep = 1.0 - 1.0 / memory
        self._explore_every = explore_every
        self._idle_budget = idle_budget
        # How often position i was decided, and how often it was accepted; pooled over the positions with a prior worth
        # two observations, which speaks for positions not yet tried.
        self._reached: list[float] = []
        self._accepted: list[float] = []
        self._pooled_reached, self._pooled_accepted = 2.0, 2.0 * acceptance
        self._draft_cost = _Line(self._keep)
        self._verify_seconds = _Mean(self._keep)
        self._rounds = 0
        self._idle = 0

    def draft_length(self, limit: int) -> int:
        self._rounds += 1
        if limit <= 0:
            return 0
        if not self._draft_cost.known or not self._verify_seconds.known:
            return min(self._start, limit)
        best, gain = self._best(limit)
        if gain <= 0.0:
            self._idle += 1
            if self._idle * self._idle_budget < -gain:
                return 0
            self._idle = 0
            return best
        self._idle = 0
        if self._rounds % self._explore_every == 0:
            up = self._rounds // self._explore_every % 2 == 0
            return min(best + 1, limit) if up else max(best - 1, 1)
        return best

    def observe(self, round: Round) -> None:
        self._verify_seconds.add(round.verify_seconds)
        if round.asked == 0:
            return
        self._draft_cost.add(round.asked, round.draft_seconds)
        self._pooled_reached *= self._keep
        self._pooled_accepted *= self._keep
        missing = round.asked - len(self._reached)
        self._reached.extend([0.0] * missing)
        self._accepted.extend([0.0] * missing)
        # Position i was decided if everything before it was accepted. A draft that proposed fewer ids than asked
        # counts as not accepted there: what matters is what asking for it brings.
        for i in range(min(round.accepted + 1, round.asked)):
            hit = 1.0 if i < round.accepted else 0.0
            self._reached[i] = self._reached[i] * self._keep + 1.0
            self._accepted[i] = self._accepted[i] * self._keep + hit
            self._pooled_reached += 1.0
            self._pooled_accepted += hit

    def _best(self, limit: int) -> tuple[int, float]:
        """The k >= 1 with the most expected tokens per second, and what a round of it gains over plain decoding.

        The gain is in tokens: those of the round less those that plain decoding would have made in its time.
        """
        plain = max(self._verify_seconds.value, 1e-9)
        expected, survival = 1.0, 1.0
        best, best_goodput, gain = 0, 0.0, 0.0
        for k in range(1, limit + 1):
            survival *= self._acceptance(k - 1)
            expected += survival
            steps = (self._draft_cost.at(k) + plain) / plain
            if expected / steps > best_goodput:
                best, best_goodput, gain = k, expected / steps, expected - steps
        return best, gain

    def _acceptance(self, position: int) -> float:
        """Probability of acceptance at a position, given that everything before it was accepted."""
        pooled = self._pooled_accepted / self._pooled_reached
        if position >= len(self._reached):
            return pooled
        weight = 2.0
        return (self._accepted[position] + weight * pooled) / (self._reached[position] + weight)


class _Mean:
    """A mean that forgets: an observation's weight falls by `keep` with every later one."""

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._weight = 0.0
        self._sum = 0.0

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
        self._x, self._y, self._xx, self._xy = (_Mean(keep) for _ in range(4))

    @property
    def known(self) -> bool:
        return self._x.known

    def add(self, x: float, y: float) -> None:
        self._x.add(x)
        self._y.add(y)
        self._xx.add(x * x)
        self._xy.add(x * y)

    def at(self, x: float) -> float:
        mean_x, mean_y = self._x.value, self._y.value
        variance = self._xx.value - mean_x * mean_x
        proportional = mean_y / mean_x if mean_x else 0.0
        # With too little spread in x the slope is noise: then all of the time is the tokens'. Neither a negative slope
        # nor a negative start makes sense.
        slope = (self._xy.value - mean_x * mean_y) / variance if variance > 0.05 else proportional
        slope = min(max(slope, 0.0), proportional)
        return mean_y + slope * (x - mean_x)
