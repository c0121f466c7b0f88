"""What proposals have brought so far, by what was said for them: looked up, with a match how long, or by a model.

Everything is computed from what it is told: no clock, no randomness.
"""

from __future__ import annotations

from dataclasses import dataclass

from specpair.pacing import Mean, Round

__all__ = ["Yields"]

# How much an observation still counts after each later one of its kind: a third after 40.
_KEEP = 1.0 - 1.0 / 40.0
# The first id comes true with this probability, by class of the match's length (`lookup`), and each further one with
# the other, as in held-out Python code. They speak as loudly as so many observations.
_FIRST = (0.25, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.9)
_NEXT = (0.5, 0.5, 0.65, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.95)
_WEIGHT = 4.0
# A step of the target costs the same however many ids are proposed; what one more id costs on its way is less than this
# share of a step.
_COST = 0.004
# What is not expected to pay is tried now and then: so often that it costs this share of the time, and after so many
# rounds at the earliest.
_BUDGET = 0.01
_PATIENCE = 10
# A round with a model, until one has been observed: tokens, and seconds in those of a round with a lookup.
_MODEL_TOKENS, _MODEL_SECONDS = 2.5, 1.5


@dataclass(slots=True)
class _Kind:
    """How lookups of one kind have come out."""

    first: Mean
    further: Mean
    passed: int = 0
    """Times in a row that it was passed over."""


class Yields:
    """The yields of one session."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, int], _Kind] = {}
        # Of rounds with the model: tokens and seconds.
        self._tokens, self._seconds = Mean(_KEEP, _MODEL_TOKENS, _WEIGHT), Mean(_KEEP)
        # Seconds from a block of proposals to its verdict, and from one plain step to the next one behind it, which
        # goes ahead of verdicts: with a network between, that is much less.
        self._verdict, self._plain = Mean(_KEEP), Mean(_KEEP)
        self._steady = False

    def best_length(self, kind: tuple[str, int], most: int) -> tuple[int, float]:
        """How many of `most` >= 1 ids to propose, at least one, and the tokens that a step's time then brings.

        With k ids a round yields 1 + a + a b + ... + a b^(k-1) tokens, a and b the measured acceptance of the first and
        of each further id (Leviathan et al. 2023, equation 1, but for the first).
        """
        seen = self._kind(kind)
        survival, further = seen.first.value, seen.further.value
        expected, best, goodput = 1.0, 0, 0.0
        for k in range(1, most + 1):
            expected += survival
            survival *= further
            if expected / (1.0 + k * _COST) > goodput:
                best, goodput = k, expected / (1.0 + k * _COST)
        return best, goodput

    @property
    def model(self) -> float:
        """Tokens that the model brings in the time of a round with a lookup."""
        verdict = self._verdict.value
        seconds = self._seconds.value if self._seconds.known else verdict * _MODEL_SECONDS
        return self._tokens.value * verdict / seconds if verdict and seconds else _MODEL_TOKENS / _MODEL_SECONDS

    @property
    def plain(self) -> float:
        """Tokens that plain steps bring in the time of a round with a lookup, at least one."""
        verdict, plain = self._verdict.value, self._plain.value
        return max(verdict / plain, 1.0) if plain else 1.0

    def pays(self, kind: tuple[str, int], goodput: float, otherwise: float) -> bool:
        """Whether to propose what brings `goodput` where something else brings `otherwise`, to try it included."""
        seen = self._kind(kind)
        seen.passed += 1
        return goodput > otherwise or seen.passed > _PATIENCE + (otherwise - goodput) / _BUDGET

    def proposed(self, kind: tuple[str, int]) -> None:
        """A lookup of this kind is on its way."""
        self._kind(kind).passed = 0

    def looked_up(self, kind: tuple[str, int], round: Round) -> None:
        """A round with a lookup is over."""
        seen = self._kind(kind)
        self._verdict.add(round.seconds)
        self._steady = False
        if not round.proposed:  # all that was found became the guess, or could not be sent to the target
            seen.first.add(1.0 if round.guessed else 0.0)
        for i in range(min(round.accepted + 1, round.proposed)):
            (seen.further if i else seen.first).add(1.0 if i < round.accepted else 0.0)

    def modelled(self, round: Round) -> None:
        """A round with the model is over, whether it proposed something or not."""
        self._tokens.add(round.accepted + 1.0)
        self._seconds.add(round.seconds)
        if round.asked:
            self._verdict.add(round.verify_seconds)
            self._steady = False

    def stepped(self, round: Round) -> None:
        """A plain step is over."""
        if self._steady:
            self._plain.add(round.seconds)
        self._steady = True

    def _kind(self, kind: tuple[str, int]) -> _Kind:
        if (known := self._kinds.get(kind)) is None:
            length = kind[1]
            known = self._kinds[kind] = _Kind(Mean(_KEEP, _FIRST[length], _WEIGHT), Mean(_KEEP, _NEXT[length], _WEIGHT))
        return known
