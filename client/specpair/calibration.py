"""What a draft's confidence is worth: how often proposals come true of which it was so sure.

A draft's probability of its own proposal says little by itself: a small model is often too sure, and under sampling
with shared noise it is the target's distribution that decides. So its word is taken for how proposals rank, and what
the ranks are worth is measured. No clock, no randomness.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

__all__ = ["UNENDING", "Calibration"]

# Less than any product of probabilities that matters: asks for confidence, and ends nothing.
UNENDING = 1e-30

# Upper ends of the classes of confidence. The last one is reached by certainty only, and never ends a proposal.
_EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_MIDDLES = tuple((low + high) / 2 for low, high in zip((0.0, *_EDGES), (*_EDGES, 1.0), strict=True))
# A class's own confidence is believed as if it had been observed so often.
_PRIOR = 4.0


class Calibration:
    """P(the first i ids of a proposal are all accepted), by the product of the draft's probabilities of them.

    `keep` is what remains of an observation's weight with every later one of its class.
    """

    def __init__(self, *, keep: float) -> None:
        self._keep = keep
        self._seen = [0.0] * len(_MIDDLES)
        self._true = [0.0] * len(_MIDDLES)

    def observe(self, confidence: Sequence[float], accepted: int) -> None:
        """Learns from a block: the draft's probability of each id, and how many were accepted."""
        for i, sure in enumerate(accumulate(confidence, mul)):
            place = bisect_right(_EDGES, sure)
            self._seen[place] = self._seen[place] * self._keep + 1.0
            self._true[place] = self._true[place] * self._keep + (i < accepted)

    def probability(self, confidence: float) -> float:
        """How probable a proposal is of which the draft is so sure."""
        return self._measured(bisect_right(_EDGES, confidence))

    def confidence_for(self, probability: float) -> float:
        """The confidence below which proposals are less probable than this, from the lowest up; in (0, 0.9].

        Never 0, since a draft that is not asked for its confidence does not give it, and nothing can be learnt.
        """
        for place, below in enumerate((UNENDING, *_EDGES)):
            if self._measured(place) >= probability:
                return below
        return _EDGES[-1]

    def _measured(self, place: int) -> float:
        return (self._true[place] + _PRIOR * _MIDDLES[place]) / (self._seen[place] + _PRIOR)
