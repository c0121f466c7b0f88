"""A decoder's forward pass with as few operations as it needs.

For small models, and on a CPU for all that are quantized well, most of a step is not arithmetic but the calling of
operations. This is the decoder that Llama, Mistral, Qwen 2 and Qwen 3 share (Touvron et al. 2023, arXiv:2302.13971),
over the weights of transformers' modules: joined projections, rotary angles from a table, masks and query groups folded
once per step. Every other family runs in transformers' own code. A service compares both at load (`self_check`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from specpair_runtime.models.attention import registered_name
from specpair_runtime.models.packing import JoinedLinear, pack_linears
from specpair_runtime.models.slot_cache import SlotCache

__all__ = ["LeanDecoder", "prepare"]

_FAMILIES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
# Those whose angles depend on the position alone, not on how long the sequence is.
_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})

Masks = torch.Tensor | dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Layer:
    """What one layer computes with. The norms of queries and keys are Qwen 3's."""

    kind: str
    input_norm: torch.Tensor
    qkv: nn.Module
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: nn.Module
    mlp_norm: torch.Tensor
    gate_up: nn.Module
    activation: nn.Module
    down: nn.Module


class LeanDecoder:
    """The forward pass of a prepared model over a slot cache; a step's `view` must be set."""

    def __init__(self, model: PreTrainedModel, layers: list[_Layer], positions: int) -> None:
        """Positions from `positions` on, where rows only pad a step, take the angles of the last one."""
        config, base = model.config, model.base_model
        self.columns = _keeps_columns(model)
        """Whether keys are to be cached as columns."""
        self._layers = layers
        self._head = model.get_output_embeddings()
        self._embedding: torch.Tensor = base.embed_tokens.weight.detach()
        self._norm: torch.Tensor = base.norm.weight.detach()
        self._epsilon: float = config.rms_norm_eps
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._dim: int = base.layers[0].self_attn.head_dim
        self._scaling: float = base.layers[0].self_attn.scaling
        self._cosines, self._sines = _angles(model, positions)

    def hidden(self, token_ids: torch.Tensor, masks: Masks, cache: SlotCache) -> torch.Tensor:
        """Final hidden states, [batch, rows, width], of `token_ids` ([batch, rows]); writes their KV."""
        batch, rows = token_ids.shape
        heads, kv_heads, dim = self._heads, self._kv_heads, self._dim
        group = heads // kv_heads
        folded = _fold_masks(masks, group)
        at = cache.view.positions.clamp(max=len(self._cosines) - 1)
        cosines, sines = self._cosines[at][:, :, None], self._sines[at][:, :, None]  # [batch, rows, 1, dim]
        x = functional.embedding(token_ids, self._embedding)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(self._rms(x, layer.input_norm)).view(batch, rows, heads + 2 * kv_heads, dim)
            turned = qkv[:, :, : heads + kv_heads]
            if layer.query_norm is not None and layer.key_norm is not None:
                queries = self._rms(turned[:, :, :heads], layer.query_norm)
                turned = torch.cat([queries, self._rms(turned[:, :, heads:], layer.key_norm)], dim=2)
            # The rotation of halves (Su et al. 2021, arXiv:2104.09864), its sign in the sines.
            turned = torch.addcmul(turned * cosines, turned.roll(dim // 2, -1), sines)
            keys, values = cache.layers[index].update(
                turned[:, :, heads:].transpose(1, 2), qkv[:, :, heads + kv_heads :].transpose(1, 2)
            )
            # The query heads of a group become further rows of their key/value head: no copies of the cache.
            queries = turned[:, :, :heads].view(batch, rows, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
            queries = queries.reshape(batch, kv_heads, group * rows, dim)
            attended = self._attend(queries, keys, values, folded[layer.kind])
            attended = attended.view(batch, kv_heads, group, rows, dim).permute(0, 3, 1, 2, 4)
            x = x + layer.output(attended.reshape(batch, rows, heads * dim))
            gate, up = layer.gate_up(self._rms(x, layer.mlp_norm)).chunk(2, dim=-1)
            x = x + layer.down(layer.activation(gate) * up)
        return self._rms(x, self._norm)

    def logits(self, token_ids: torch.Tensor, masks: Masks, cache: SlotCache) -> torch.Tensor:
        """Logits of [batch, rows, vocabulary], padding included."""
        outputs: torch.Tensor = self._head(self.hidden(token_ids, masks, cache))
        return outputs

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        if not self.columns:
            return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self._scaling)
        scores = torch.add(mask, queries @ keys, alpha=self._scaling)
        return scores.softmax(dim=-1) @ values

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._epsilon)


def _keeps_columns(model: PreTrainedModel) -> bool:
    # torch's attention for bf16 on a CPU takes about twice the time of two products over such keys.
    return bool(model.device.type == "cpu" and model.dtype == torch.bfloat16)


def prepare(model: PreTrainedModel, *, positions: int, rows: int, pack: bool) -> LeanDecoder | None:
    """Makes a model's weights ready for steps of `rows` rows; its lean decoder, if its family has one.

    The model's own code goes on to work, over the same weights. With `pack`, linear layers on a CPU are packed, which
    what compiles for itself cannot use.
    """
    joined = _join(model, rows, pack) if _is_supported(model) else None
    if pack:
        pack_linears(model, rows)
    return LeanDecoder(model, _layers(model, joined), positions) if joined is not None else None


def _is_supported(model: PreTrainedModel) -> bool:
    config = model.config
    if type(model).__name__ not in _FAMILIES or config._attn_implementation != registered_name("sdpa"):
        return False
    rope: dict[str, Any] = config.rope_parameters
    whole = bool(rope.get("partial_rotary_factor", 1.0) == 1.0 and getattr(config, "pretraining_tp", 1) == 1)
    return whole and str(rope["rope_type"]) in _ROPE_TYPES


def _join(model: PreTrainedModel, rows: int, pack: bool) -> list[tuple[JoinedLinear, JoinedLinear]]:
    """Joins the projections of each layer that read the same input: of attention, and of the MLP."""
    joined = []
    for module in model.base_model.layers:
        attention, mlp = module.self_attn, module.mlp
        qkv = JoinedLinear([attention.q_proj, attention.k_proj, attention.v_proj], rows=rows, pack=pack)
        attention.q_proj, attention.k_proj, attention.v_proj = qkv.parts
        gate_up = JoinedLinear([mlp.gate_proj, mlp.up_proj], rows=rows, pack=pack)
        mlp.gate_proj, mlp.up_proj = gate_up.parts
        joined.append((qkv, gate_up))
    return joined


def _layers(model: PreTrainedModel, joined: list[tuple[JoinedLinear, JoinedLinear]]) -> list[_Layer]:
    layers = []
    kinds = getattr(model.config, "layer_types", None) or [""] * len(joined)
    for kind, module, (qkv, gate_up) in zip(kinds, model.base_model.layers, joined, strict=True):
        attention, mlp = module.self_attn, module.mlp
        query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        layers.append(
            _Layer(
                kind=kind,
                input_norm=module.input_layernorm.weight.detach(),
                qkv=qkv,
                query_norm=None if query_norm is None else query_norm.weight.detach(),
                key_norm=None if key_norm is None else key_norm.weight.detach(),
                output=attention.o_proj,
                mlp_norm=module.post_attention_layernorm.weight.detach(),
                gate_up=gate_up,
                activation=mlp.act_fn,
                down=mlp.down_proj,
            )
        )
    return layers


def _angles(model: PreTrainedModel, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines of the rotary angles, each of [positions, dim]."""
    embedding = model.base_model.embed_tokens.weight
    at = torch.arange(positions, device=embedding.device)[None]
    cosines, sines = model.base_model.rotary_emb(embedding[:1], at)
    half = sines.shape[-1] // 2
    sines = torch.cat([-sines[0, :, :half], sines[0, :, half:]], dim=-1)
    return cosines[0].detach().clone(), sines.detach()


def _fold_masks(masks: Masks, group: int) -> dict[str, torch.Tensor]:
    """Masks by layer type, [batch, 1, group * rows, positions]; one mask for all is under the empty name."""
    by_kind = masks if isinstance(masks, dict) else {"": masks}
    return {kind: mask.repeat(1, 1, group, 1) for kind, mask in by_kind.items()}
