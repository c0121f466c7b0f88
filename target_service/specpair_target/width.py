"""The width of verify steps, chosen by what steps cost on this machine: `--verify-width auto`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch

from specpair_runtime.models.runner import ModelRunner

__all__ = ["CANDIDATES", "best_width", "expected_tokens", "step_costs"]

CANDIDATES = (1, 2, 4, 6, 8, 12, 16)
_REPEATS = 9
# Scores that differ by less than this share are the same: timings are no better.
_TIE = 0.02


def expected_tokens(width: int, acceptance: float) -> float:
    """Tokens that a step of `width` rows is expected to give when each proposal is accepted with this probability.

    Leviathan et al. 2023 (arXiv:2211.17192), equation 1, for width - 1 proposals.
    """
    return sum(acceptance**row for row in range(width))


def best_width(costs: Mapping[int, float], acceptance: float) -> int:
    """The width that gives the most expected tokens for its cost, in any unit; of equals the one that costs least."""
    scores = {width: expected_tokens(width, acceptance) / cost for width, cost in costs.items()}
    good = [width for width, score in scores.items() if score >= (1 - _TIE) * max(scores.values())]
    return min(good, key=lambda width: (costs[width], width))


def step_costs(runner: ModelRunner, widths: Sequence[int] = CANDIDATES) -> dict[int, float]:
    """Median milliseconds of a step of one session at each width, measured in turns.

    A compiled runner compiles a step of each width for it.
    """
    times: dict[int, list[float]] = {width: [] for width in widths}
    # The first rounds pay for first calls; CUDA graphs are recorded in the second one.
    for repeat in range(-2, _REPEATS):
        for width in widths:
            began = time.perf_counter()
            _step(runner, width)
            if repeat >= 0:
                times[width].append(1e3 * (time.perf_counter() - began))
    return {width: statistics.median(taken) for width, taken in times.items()}


def _step(runner: ModelRunner, width: int) -> None:
    """A step at the very beginning of the first slot, up to its results on the host, as steps end."""
    batch, length = runner.batch_buckets()[0], runner.length_buckets()[0]
    starts = torch.ones(batch, dtype=torch.int64)
    logits = runner.logits(0, torch.zeros((batch, width), dtype=torch.int64), starts, length)
    logits.argmax(dim=-1).cpu()
