"""Additive attention masks over a slot cache."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

__all__ = ["AttentionMasks"]


class AttentionMasks:
    """Builds the masks that a model family expects: one tensor, or a dict per layer type.

    A row at position p attends to positions up to p; on a sliding layer to the last `sliding_window` of them.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        config = config.get_text_config(decoder=True)
        self._dtype = dtype
        self._window: int | None = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            self._window = None
        layer_types = getattr(config, "layer_types", None)
        self._layer_types: list[str] = sorted(set(layer_types)) if layer_types else []

    def build(self, positions: torch.Tensor, length: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Masks of [batch, 1, rows, length] for rows at `positions` ([batch, rows])."""
        if not self._layer_types:
            return self._mask(positions, length, self._window)
        return {
            kind: self._mask(positions, length, self._window if kind == "sliding_attention" else None)
            for kind in self._layer_types
        }

    def _mask(self, positions: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
        rows = positions[:, None, :, None]
        columns = torch.arange(length, device=positions.device)
        seen = columns <= rows
        if window is not None:
            seen = seen & (columns > rows - window)
        hidden = torch.full((), torch.finfo(self._dtype).min, dtype=self._dtype, device=positions.device)
        return torch.where(seen, torch.zeros_like(hidden), hidden)
