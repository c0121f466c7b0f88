"""How many blocks to send ahead of the verdict: as many as measured to pay. The output never depends on it.

Let p be the chance that a block and the guess behind it come true as a whole, and d, v and n the seconds for drafting,
for the target's step and for the network. One block after the other, a round takes d + v + n. With m blocks ahead, one
that continues what came true takes no longer than the slowest of those at work, or its share of the whole way; one that
does not takes all of it, and the draft's time for one id more, the guess:

    (1 - p) (d + v + n + guess) + p max(v, drafting, (d + v + n) / (m + 1))

PEARL (Liu et al. 2024) and DSI (Timor et al. 2024) draft on while the target verifies; here the network is hidden too.
"""

from __future__ import annotations

from math import ceil

from specpair.meter import Trip
from specpair.pacing import Mean, Round

__all__ = ["Depth"]

_DEEPEST = 8
# Plain steps always come true, so more of them may be under way.
_MOST_STEPS = 24
# Seconds of everybody's work for a message that was sent in vain.
_MESSAGE = 2e-4
# By how much the time of a round must fall for blocks to be sent ahead, and to be sent ahead no more: what is measured
# moves about, and chains that come and go cost more than either.
_BEGIN, _END = 0.9, 0.95
_KEEP = 1.0 - 1.0 / 40.0
# The acceptance of ids speaks for that of guesses as if so many had been observed.
_PRIOR = 4.0


class Depth:
    """`blocks` is the number to send ahead of a verdict: `fixed`, or what pays if that is None."""

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self.blocks = fixed or 0
        self._draft, self._engine, self._network, self._drafting = (Mean(_KEEP) for _ in range(4))
        # How often an id was accepted, and a block as a whole; how many guesses were made behind such blocks, and how
        # many were right.
        self._id, self._whole = Mean(_KEEP), Mean(_KEEP)
        self._guesses = self._right = 0.0
        self._length = Mean(_KEEP)

    def observe(self, round: Round, trip: Trip | None, draft_us: int) -> None:
        """Learns from a round; `trip` if its block was sent with no other one under way."""
        if self._fixed is not None:
            return
        if trip is not None:
            self._engine.add(trip.engine_seconds)
            self._network.add(max(trip.seconds - trip.engine_seconds, 0.0))
        if not round.asked:
            return
        if trip is not None:
            self._draft.add(trip.draft_seconds)
        self._drafting.add(draft_us / 1e6)
        self._length.add(round.asked)
        for i in range(min(round.accepted + 1, round.proposed)):
            self._id.add(i < round.accepted)
        whole = round.accepted == round.proposed
        self._whole.add((whole and round.proposed > 0) or bool(round.guessed))
        # Forgotten in every round, so that a chain which has ended for wrong guesses is tried again one day.
        guessed = round.guessed is not None and whole
        self._guesses = self._guesses * _KEEP + guessed
        self._right = self._right * _KEEP + bool(round.guessed)
        if self._draft.known:
            self._choose()

    @property
    def steps(self) -> int:
        """Plain steps to send ahead, which always come true: as many as keep the target at work."""
        if self._fixed is not None:
            return self._fixed
        ways = self._network.value / self._engine.value if self._engine.value else 1.0
        return min(max(ceil(ways), 1), _MOST_STEPS)

    def seconds(self, blocks: int) -> float:
        """What a round takes with so many blocks ahead."""
        serial = self._draft.value + self._engine.value + self._network.value
        if blocks == 0:
            return serial
        true = self._whole.value * (self._right + _PRIOR * self._id.value) / (self._guesses + _PRIOR)
        guess = self._drafting.value / max(self._length.value, 1.0)
        steady = max(self._engine.value, self._drafting.value, serial / (blocks + 1))
        return (1.0 - true) * (serial + guess) + true * steady + blocks * _MESSAGE

    def _choose(self) -> None:
        best = min(range(1, _DEEPEST + 1), key=self.seconds)
        self.blocks = best if self.seconds(best) < self.seconds(0) * (_END if self.blocks else _BEGIN) else 0
