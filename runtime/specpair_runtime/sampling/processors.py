"""Logits processors, vectorised over sessions and block positions, with the semantics of transformers' own."""

from __future__ import annotations

import torch

from specpair_runtime.sampling.params import SamplingBatch

__all__ = ["process"]

# How many of the best tokens are looked at for top-p before all of them are sorted.
_FIRST_LOOKS = (64, 1024)


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
        scores = _top_p(scores, params)
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


def _top_p(scores: torch.Tensor, params: SamplingBatch) -> torch.Tensor:
    rows = scores.shape[1]
    limits = params.top_p.repeat_interleave(rows)  # [batch * rows]
    flat = scores.flatten(0, 1)
    if scores.device.type != "cpu":
        # Waiting for what a first look has found would cost more than sorting everything.
        return torch.where((limits < 1.0)[:, None], _nucleus(flat, limits), flat).view_as(scores)
    result = flat.clone()
    open_ = (limits < 1.0).nonzero()[:, 0]
    for most in (*_FIRST_LOOKS, scores.shape[-1]):
        if len(open_) == 0:
            break
        cut, decided = _nucleus_among(flat[open_], limits[open_], most)
        result[open_[decided]] = cut[decided]
        open_ = open_[~decided]
    return result.view_as(scores)


def _nucleus(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest set of tokens whose probability reaches `top_p` ([rows]); the others at minus infinity."""
    ascending, order = scores.sort(dim=-1, stable=True)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= (1 - top_p)[:, None]
    # The most probable token always stays.
    removed[..., -1] = False
    return scores.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def _nucleus_among(scores: torch.Tensor, top_p: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_nucleus`, looking at the `most` best tokens only; and for which rows ([rows]) those were enough.

    Whether they are depends on a row alone, so its result does not depend on its company.
    """
    if most >= scores.shape[-1]:
        return _nucleus(scores, top_p), torch.ones_like(top_p, dtype=torch.bool)
    values, ids = scores.topk(most, dim=-1)
    # In the order of `_nucleus`, backwards: of equal ones the higher id comes first.
    by_id = ids.sort(dim=-1, descending=True)
    by_value = values.gather(-1, by_id.indices).sort(dim=-1, descending=True, stable=True)
    ids, values = by_id.values.gather(-1, by_value.indices), by_value.values
    probs = scores.softmax(dim=-1).gather(-1, ids)
    before = probs.cumsum(dim=-1) - probs
    kept = before < top_p[:, None]
    # Tokens as probable as the last one that is kept may lie outside.
    decided = ~kept[:, -1] & (values[:, -1] < torch.where(kept, values, torch.inf).amin(dim=-1))
    cut = torch.full_like(scores, -torch.inf).scatter(-1, ids, values.masked_fill(~kept, -torch.inf))
    return cut, decided


def _min_p(scores: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    probs = scores.softmax(dim=-1)
    removed = probs < min_p[:, None, None] * probs.amax(dim=-1, keepdim=True)
    return scores.masked_fill(removed, -torch.inf)
