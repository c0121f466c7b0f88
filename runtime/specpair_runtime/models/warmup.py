"""Warming a runner up, so that no request pays for a first call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from specpair_runtime.models.runner import ModelRunner

__all__ = ["CompileCounter", "warm_up"]


def warm_up(runner: ModelRunner, widths: Sequence[int], advance: Callable[[float], None]) -> None:
    """Runs every shape that a compiled runner will meet, or one of each width when nothing is compiled.

    `advance` is told the progress, from 0 to 1. Slots hold rubbish afterwards, which no session attends to.
    """
    batches, lengths = runner.batch_buckets(), runner.length_buckets()
    if not runner.compiled:
        batches, lengths = batches[:1], lengths[:1]
    shapes = [(batch, width, length) for width in widths for batch in batches for length in lengths]
    # CUDA graphs are recorded in the second call of a shape.
    rounds = 3 if runner.compiled else 1
    runner.prefill(0, [0] * min(16, runner.max_length), 0)
    for done, (batch, width, length) in enumerate(shapes):
        advance(done / len(shapes))
        for _ in range(rounds):
            ids = torch.zeros((batch, width), dtype=torch.int64)
            runner.logits(0, ids, torch.zeros(batch, dtype=torch.int64), length)
    advance(1.0)


class CompileCounter:
    """Counts graphs compiled since `reset`; 0 after a warm-up is the promise."""

    def __init__(self) -> None:
        self._before = self._compiled()

    def reset(self) -> None:
        """Forgets what was compiled until now."""
        self._before = self._compiled()

    @property
    def count(self) -> int:
        """Graphs compiled since the last reset."""
        return self._compiled() - self._before

    @staticmethod
    def _compiled() -> int:
        counters: dict[str, int] = torch._dynamo.utils.counters["stats"]
        return counters["unique_graphs"]
