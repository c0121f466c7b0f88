"""Logits processors, vectorised over sessions and block positions, with the semantics of transformers' own."""

from __future__ import annotations

import torch

from specpair_runtime.sampling.params import SamplingBatch

__all__ = ["process"]


def process(logits: torch.Tensor, params: SamplingBatch) -> torch.Tensor:
    """Temperature, then top-k, then top-p, then min-p, as `generate` applies them.

    `logits` is [batch, rows, vocabulary], float32; returns scores of that shape, removed tokens at minus infinity.
    Rows of greedy sessions come back unscaled and complete: only their maximum matters.
    """
    # Where a session is greedy its temperature is 0; dividing by 1 keeps the row finite.
    temperature = torch.where(params.temperature > 0, params.temperature, 1.0)
    scores = logits / temperature[:, None, None]
    if params.largest_top_k > 0:
        scores = _top_k(scores, params.top_k, params.largest_top_k)
    if params.any_top_p:
        scores = _top_p(scores, params.top_p)
    if params.any_min_p:
        scores = _min_p(scores, params.min_p)
    return scores


def _top_k(scores: torch.Tensor, top_k: torch.Tensor, largest_top_k: int) -> torch.Tensor:
    most = min(largest_top_k, scores.shape[-1])
    # A k may be larger than the vocabulary; 0 means no limit, whatever its rank here.
    rank = (top_k - 1).clamp(min=0, max=most - 1)
    threshold = scores.topk(most, dim=-1).values.gather(-1, rank[:, None, None].expand(*scores.shape[:-1], 1))
    removed = (scores < threshold) & (top_k > 0)[:, None, None]
    return scores.masked_fill(removed, -torch.inf)


def _top_p(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    ascending, order = scores.sort(dim=-1, stable=True)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= (1 - top_p)[:, None, None]
    # The most probable token always stays, and top_p = 1 means the whole row whatever the rounding of the sum.
    removed[..., -1] = False
    removed &= (top_p < 1.0)[:, None, None]
    return scores.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def _min_p(scores: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    probs = scores.softmax(dim=-1)
    removed = probs < min_p[:, None, None] * probs.amax(dim=-1, keepdim=True)
    return scores.masked_fill(removed, -torch.inf)
