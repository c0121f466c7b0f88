"""The slot cache: a static KV cache in which every slot is at its own position.

transformers' StaticCache holds one common length for the whole batch. Here slot s belongs to one session, rows are
written at the positions that the step names, and a rollback is an assignment to a length that the caller keeps: what
lies beyond it is masked until it is overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import StaticLayer

__all__ = ["SlotCache", "StepView"]


@dataclass
class StepView:
    """Where the rows of the current forward pass go, shared by all layers.

    `positions` is [batch, rows], int64: the position that each row writes. The step covers the slots from
    `first_slot` to `first_slot + batch - 1` and attends to the first `length` positions.
    """

    positions: torch.Tensor
    first_slot: int
    length: int


class SlotLayer(StaticLayer):
    """One layer: keys and values of [slots, kv_heads, max_cache_len, head_dim].

    With `columns` keys are kept as columns, [slots, kv_heads, head_dim, max_cache_len], and given back so.
    """

    def __init__(self, slots: int, max_cache_len: int, view: StepView, *, columns: bool) -> None:
        super().__init__(max_cache_len)
        self.slots = slots
        self.view = view
        self.columns = columns

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates all slots, whatever the batch of the first call."""
        super().lazy_initialization(
            key_states[:1].expand(self.slots, -1, -1, -1), value_states[:1].expand(self.slots, -1, -1, -1)
        )
        if self.columns:
            self.keys: torch.Tensor = self.keys.mT.contiguous()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [batch, kv_heads, rows, head_dim] at the step's positions; returns views of the slots, no copies."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, end = self.view.first_slot, self.view.first_slot + key_states.shape[0]
        # Layers may be on several devices.
        positions = self.view.positions.to(key_states.device)
        slots = torch.arange(first, end, device=positions.device)[:, None]
        # Not scatter_, which takes ten times as long for bf16 on a CPU.
        self.values[slots, :, positions] = value_states.transpose(1, 2)
        values = self.values[first:end, :, : self.view.length]
        if self.columns:
            self.keys[slots, :, :, positions] = key_states.transpose(1, 2)
            return self.keys[first:end, ..., : self.view.length], values
        self.keys[slots, :, positions] = key_states.transpose(1, 2)
        return self.keys[first:end, :, : self.view.length], values

    def get_seq_length(self) -> int:
        """0: positions are given explicitly, and a length per slot is the caller's."""
        return 0


class SlotCache(Cache):
    """A `Cache` of `SlotLayer`s that share one `StepView`."""

    def __init__(
        self, config: PreTrainedConfig, slots: int, positions: int, device: torch.device, *, columns: bool = False
    ) -> None:
        """`columns` lays keys out for products with them, which transformers' own code does not expect."""
        self.view = StepView(torch.zeros((1, 1), dtype=torch.int64, device=device), 0, positions)
        self.slots = slots
        self.positions = positions
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[SlotLayer(slots, positions, self.view, columns=columns) for _ in range(layers)])

    def clear(self, slot: int) -> None:
        """Zeroes a slot. Masked positions have no weight, but no weight times NaN is NaN: none may be left behind."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[slot].zero_()
                layer.values[slot].zero_()
