"""The rejection rule, proved exactly on enumerated distributions."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpair_runtime.sampling.law import acceptance_probability, residual_weights

GRID = 6


def distributions(size: int) -> list[list[Fraction]]:
    """All distributions over `size` tokens whose probabilities are multiples of 1/GRID."""
    return [
        [Fraction(part, GRID) for part in parts]
        for parts in product(range(GRID + 1), repeat=size)
        if sum(parts) == GRID
    ]


def output_distribution(target: list[Fraction], draft: list[Fraction]) -> list[Fraction]:
    """What one proposal and its judgement emit, by the law of total probability."""
    accepted = [q * acceptance_probability(p, q) if q else Fraction(0) for p, q in zip(target, draft, strict=True)]
    rejected = 1 - sum(accepted)
    weights = residual_weights(target, draft)
    total = sum(weights)
    if rejected == 0:
        return accepted
    return [a + rejected * w / total for a, w in zip(accepted, weights, strict=True)]


@pytest.mark.parametrize("size", [2, 3])
def test_accepting_and_replacing_together_emit_the_target_distribution(size: int) -> None:
    """For every target and every draft on the grid the emitted token has exactly the target's distribution."""
    for target, draft in product(distributions(size), repeat=2):
        assert output_distribution(target, draft) == target


@pytest.mark.parametrize("size", [2, 3])
def test_a_rejection_always_leaves_something_to_draw_from(size: int) -> None:
    """When rejection is possible the residual has mass, and it is the probability of rejection."""
    for target, draft in product(distributions(size), repeat=2):
        accepted = sum(q * acceptance_probability(p, q) for p, q in zip(target, draft, strict=True) if q)
        assert sum(residual_weights(target, draft)) == 1 - accepted


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8))
def test_the_law_holds_for_any_rational_distributions(pairs: list[tuple[int, int]]) -> None:
    """The same for arbitrary rational distributions over up to eight tokens."""
    target_total, draft_total = sum(p for p, _ in pairs), sum(q for _, q in pairs)
    if target_total == 0 or draft_total == 0:
        return
    target = [Fraction(p, target_total) for p, _ in pairs]
    draft = [Fraction(q, draft_total) for _, q in pairs]
    assert output_distribution(target, draft) == target
