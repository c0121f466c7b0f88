"""The rejection rule as arithmetic: Leviathan, Kalman, Matias 2023 (arXiv:2211.17192), section 2.3 and appendix A.1;
Chen et al. 2023 (arXiv:2302.01318), algorithm 2.

Plain functions over any numbers, so that tests can prove the law in exact fractions. The vectorised form that the
target runs is in `rejection.py`; a test holds it to this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, TypeVar

__all__ = ["acceptance_probability", "residual_weights"]


class Number(Protocol):
    """What the law computes with: float, Fraction."""

    def __sub__(self, other: Self, /) -> Self: ...
    def __truediv__(self, other: Self, /) -> Self: ...
    def __lt__(self, other: Self, /) -> bool: ...


N = TypeVar("N", bound=Number)


def acceptance_probability(target_prob: N, draft_prob: N) -> N:
    """min(1, target / draft) for a token that the draft sampled, so `draft_prob` is above 0."""
    ratio = target_prob / draft_prob
    one = draft_prob / draft_prob
    return ratio if ratio < one else one


def residual_weights(target_probs: Sequence[N], draft_probs: Sequence[N]) -> list[N]:
    """max(0, target - draft) for every token: what a rejected proposal is replaced from, not normalised."""
    weights = []
    for target_prob, draft_prob in zip(target_probs, draft_probs, strict=True):
        difference = target_prob - draft_prob
        zero = difference - difference
        weights.append(zero if difference < zero else difference)
    return weights
