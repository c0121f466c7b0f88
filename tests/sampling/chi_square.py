"""How likely a sample is under a distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

# Least expected count of a cell; rarer outcomes share one.
_LEAST = 8


def chi_square(outcomes: Sequence[int], probs: Sequence[float]) -> float:
    """The p value of a chi-square test that `outcomes` were drawn from `probs`; 0 if one of them is impossible."""
    counts = np.bincount(outcomes, minlength=len(probs))
    expected = np.asarray(probs, dtype=np.float64) / np.sum(probs, dtype=np.float64) * len(outcomes)
    if counts[expected == 0].any():
        return 0.0
    common = expected >= _LEAST
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    if expected[-1] < _LEAST:
        # Too few even together: they join the rarest of the others.
        rarest = expected[:-1].argmin()
        counts[rarest] += counts[-1]
        expected[rarest] += expected[-1]
        counts, expected = counts[:-1], expected[:-1]
    return 1.0 if len(expected) == 1 else float(stats.chisquare(counts, expected).pvalue)
