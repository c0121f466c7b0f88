"""Attention over a slot cache without copies of it.

Stock SDPA repeats the key/value heads for every query head as soon as a mask is given, which copies the cache in each
layer. Here the query heads of a group become further rows of their key/value head instead.
"""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from specpair_runtime.models.options import AttentionName

__all__ = ["register_attention", "registered_name"]

# transformers refuses names that contain those of its own attentions for families that do not have these.
_NAMES: dict[AttentionName, str] = {
    "eager": "eager",
    "sdpa": "specpair_grouped",
    "flex_attention": "specpair_scored",
    "flash_attention_2": "specpair_cached",
}


def registered_name(name: AttentionName) -> str:
    """The name under which transformers knows an attention of this module; its own one for "eager"."""
    return _NAMES[name]


def register_attention() -> None:
    """Makes the attentions of this module known to transformers; calling it again changes nothing."""
    AttentionInterface.register(registered_name("sdpa"), grouped_sdpa)
    AttentionInterface.register(registered_name("flex_attention"), grouped_flex)
    AttentionInterface.register(registered_name("flash_attention_2"), flash_over_cache)


def grouped_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
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
    _refuse_sinks(kwargs)
    folded = _fold(query, key)
    mask = attention_mask.repeat(1, 1, query.shape[1] // key.shape[1], 1)
    if softcap is None:
        output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        scores = folded @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap) + mask
        output = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return _unfold(output, query), None


def grouped_flex(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """As `grouped_sdpa`, through FlexAttention, which fuses mask and cap into one kernel when it is compiled."""
    _refuse_sinks(kwargs)
    rows = query.shape[2]

    def masked(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score + attention_mask[batch, 0, row % rows, position]

    output = flex_attention(_fold(query, key), key, value, score_mod=masked, scale=scaling)
    assert isinstance(output, torch.Tensor)
    return _unfold(output, query), None


def flash_over_cache(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """FlashAttention-2 over a KV cache whose slots are at different lengths (Dao 2023, arXiv:2307.08691).

    Takes no mask: `attention_mask` is [batch, 1, rows, 1] and holds how many positions each row sees, of which the
    last row's is the cache length; the rows before it follow by causality. Otherwise as `grouped_sdpa`.
    """
    from flash_attn import flash_attn_with_kvcache

    _refuse_sinks(kwargs)
    output: torch.Tensor = flash_attn_with_kvcache(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=attention_mask[:, 0, -1, 0].to(torch.int32),
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
    )
    return output, None


def _refuse_sinks(kwargs: dict[str, object]) -> None:
    # Leaving them out would go unnoticed as long as they are small.
    if kwargs.get("s_aux") is not None:
        raise ValueError("it has attention sinks, which eager attention alone computes")


def _fold(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[batch, heads, rows, dim] as [batch, kv_heads, groups * rows, dim]."""
    batch, heads, rows, dim = query.shape
    return query.reshape(batch, key.shape[1], heads // key.shape[1] * rows, dim)


def _unfold(output: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The inverse of `_fold` on an output, as [batch, rows, heads, dim]."""
    batch, heads, rows, _ = query.shape
    return output.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous()
