"""Log probabilities of the model's own distribution, before any processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["PositionLogprobs", "read_logprobs"]


@dataclass(frozen=True)
class PositionLogprobs:
    """Natural logarithms at one position: of the chosen token, and of the most probable ones, most probable first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def read_logprobs(
    logits: torch.Tensor, spoken: Sequence[Sequence[int]], top: Sequence[int | None]
) -> list[list[PositionLogprobs]]:
    """For each session the log probabilities of the tokens that it was given, one per row from the first on.

    `logits` is [batch, rows, vocabulary]. A session whose `top` is None gets none; the others also the so many most
    probable tokens at each position.
    """
    return [
        [] if asked is None else _read(logits[index, : len(tokens)], tokens, asked)
        for index, (tokens, asked) in enumerate(zip(spoken, top, strict=True))
    ]


def _read(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[PositionLogprobs]:
    logprobs = logits.float().log_softmax(dim=-1)  # [tokens, vocabulary]
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    ids, values = best.indices.tolist(), best.values.tolist()
    return [
        PositionLogprobs(token, logprob, tuple(zip(row_ids, row_values, strict=True)))
        for token, logprob, row_ids, row_values in zip(tokens, chosen, ids, values, strict=True)
    ]
