"""Attention over a slot cache without copies of it.

Stock SDPA repeats the key/value heads for every query head as soon as a mask is given, which copies the cache in each
layer. Here the query heads of a group become further rows of their key/value head instead.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

__all__ = ["GROUPED", "grouped_attention", "register_attention"]

GROUPED = "specpair_grouped"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """SDPA with the queries of a group folded into rows, in the signature of transformers' attention functions.

    `query` is [batch, heads, rows, head_dim], `key` and `value` [batch, kv_heads, positions, head_dim] and
    `attention_mask` [batch, 1, rows, positions], additive. Returns [batch, rows, heads, head_dim] and no weights.
    Scores are capped at `softcap` where a model does so (Gemma 2), which SDPA itself cannot.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    folded = query.reshape(batch, kv_heads, groups * rows, head_dim)
    if attention_mask is not None and groups > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    if softcap is None:
        output = scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        output = _capped(folded, key, value, attention_mask, scaling or head_dim**-0.5, softcap)
    return output.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous(), None


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * scaling / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def register_attention() -> None:
    """Makes `GROUPED` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(GROUPED, grouped_attention)
