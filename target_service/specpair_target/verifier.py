"""The verify step: judges the proposals of several sessions in one forward pass.

Leviathan, Kalman, Matias 2023 (arXiv:2211.17192), Algorithm 1, with the coupled rule of Daliri, Musco, Suresh 2024
(arXiv:2408.07978) in place of the ratio test.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specpair_runtime.models.runner import ModelRunner
from specpair_runtime.sampling.acceptance import accepted_lengths
from specpair_runtime.sampling.choice import choose
from specpair_runtime.sampling.params import GREEDY, SamplingBatch, SamplingParams

__all__ = ["Judgement", "Row", "Verifier"]


@dataclass(frozen=True)
class Row:
    """One slot's part of a step: `token_ids` go to positions from `start` on, padded to the width.

    The first id is the last committed token, the others are proposals.
    """

    start: int
    token_ids: Sequence[int]
    params: SamplingParams = GREEDY


@dataclass(frozen=True)
class Judgement:
    """What the target says to one row: its own `choices`, of which the first `accepted` equal the proposals.

    `finite` is False when the logits held NaN or no finite value, in which case the choices mean nothing.
    """

    accepted: int
    choices: list[int]
    finite: bool
    forward_us: int


class Verifier:
    """Runs steps of exactly `width` rows per session, however many were proposed: one shape, one numeric result."""

    def __init__(self, runner: ModelRunner, width: int) -> None:
        self.runner = runner
        self.width = width

    def verify(self, first_slot: int, rows: Sequence[Row], length: int) -> list[Judgement]:
        """Judges `rows` of neighbouring slots from `first_slot` on, attending to `length` positions."""
        began = time.perf_counter_ns()
        token_ids = torch.tensor([self._pad(row.token_ids) for row in rows])  # [batch, width]
        starts = torch.tensor([row.start for row in rows])  # [batch]
        counts = torch.tensor([len(row.token_ids) - 1 for row in rows])  # [batch]
        logits = self.runner.logits(first_slot, token_ids, starts, length)  # [batch, width, vocabulary]

        device = logits.device
        positions = (starts[:, None] + 1 + torch.arange(self.width)).to(device)  # of the chosen tokens
        params = SamplingBatch.of([row.params for row in rows], device)
        choices = choose(logits, positions, params)  # [batch, width]
        accepted = accepted_lengths(choices, token_ids[:, 1:].to(device), counts.to(device))  # [batch]
        finite = logits.amax(dim=-1).isfinite().all(dim=-1)  # [batch]

        # The one copy from device to host, [batch, 2 + width].
        verdicts = torch.cat([accepted[:, None], finite[:, None], choices], dim=1).tolist()
        forward_us = (time.perf_counter_ns() - began) // 1000
        return [Judgement(row[0], row[2 : row[0] + 3], bool(row[1]), forward_us) for row in verdicts]

    def _pad(self, token_ids: Sequence[int]) -> list[int]:
        return [*token_ids, *[0] * (self.width - len(token_ids))]
