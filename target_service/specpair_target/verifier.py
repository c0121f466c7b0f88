"""The verify step: judges the proposals of several sessions in one forward pass.

Leviathan, Kalman, Matias 2023 (arXiv:2211.17192), Algorithm 1; by default with the coupled rule of Daliri, Musco,
Suresh 2024 (arXiv:2408.07978) in place of the ratio test.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specpair_runtime.models.runner import ModelRunner
from specpair_runtime.sampling.logprobs import PositionLogprobs, read_logprobs
from specpair_target.judging import Block, Row, judge

__all__ = ["Judgement", "Row", "Trace", "Verifier"]


@dataclass(frozen=True)
class Trace:
    """What a judgement was based on: `logits` and processed `scores`, each of [proposals + 1, vocabulary]."""

    logits: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True)
class Judgement:
    """What the target says to one row: the first `accepted` proposals, and one token of its own behind them.

    `finite` is False when the logits held NaN or no finite value, in which case the tokens mean nothing. `logprobs` has
    an entry for each token, or none. `judge_us` is the part of `forward_us` behind the forward pass.
    """

    accepted: int
    token_ids: list[int]
    finite: bool
    forward_us: int
    judge_us: int
    logprobs: list[PositionLogprobs]
    trace: Trace | None = None


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
        logits = self.runner.logits(first_slot, token_ids, starts, length)  # [batch, width, vocabulary]
        passed = time.perf_counter_ns()

        device = logits.device
        block = Block(
            proposed=token_ids[:, 1:].to(device),
            counts=torch.tensor([len(row.token_ids) - 1 for row in rows], device=device),
            positions=(starts[:, None] + 1 + torch.arange(self.width)).to(device),
        )
        best = logits.max(dim=-1)  # [batch, width]
        accepted, choices, scores = judge(logits, best.indices, block, rows)
        within = torch.arange(self.width, device=device) <= block.counts[:, None]
        finite = (best.values.isfinite() | ~within).all(dim=-1)  # [batch]

        # The one copy from device to host, [batch, 2 + width].
        verdicts = torch.cat([accepted[:, None], finite[:, None], choices], dim=1).tolist()
        spoken = [
            [*row.token_ids[1 : said[0] + 1], said[2 + said[0]]] for row, said in zip(rows, verdicts, strict=True)
        ]
        logprobs = read_logprobs(logits, spoken, [row.top_logprobs for row in rows])
        judged = time.perf_counter_ns()
        forward_us, judge_us = (judged - began) // 1000, (judged - passed) // 1000
        traces = [
            Trace(logits[index, : len(row.token_ids)].float().cpu(), scores[index].cpu()) if row.traced else None
            for index, row in enumerate(rows)
        ]
        return [
            Judgement(said[0], tokens, bool(said[1]), forward_us, judge_us, known, trace)
            for said, tokens, known, trace in zip(verdicts, spoken, logprobs, traces, strict=True)
        ]

    def _pad(self, token_ids: Sequence[int]) -> list[int]:
        return [*token_ids, *[0] * (self.width - len(token_ids))]
