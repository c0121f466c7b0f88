"""What each row of a step may attend to in a slot cache."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

__all__ = ["AttentionMasks"]


class AttentionMasks:
    """Builds the masks that a model family expects: one tensor, or a dict per layer type.

    A row at position p attends to positions up to p; on a sliding layer to the last `sliding_window` of them. With
    `counts_only` a mask says no more than how many positions each row sees, for attention that needs no more.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, *, counts_only: bool = False) -> None:
        config = config.get_text_config(decoder=True)
        self._dtype = dtype
        self._counts_only = counts_only
        self._window: int | None = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            self._window = None
        layer_types = getattr(config, "layer_types", None)
        self._layer_types: list[str] = sorted(set(layer_types)) if layer_types else []

    def build(self, positions: torch.Tensor, length: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Masks for rows at `positions` ([batch, rows]): additive ones of [batch, 1, rows, length], or counts of
        [batch, 1, rows, 1].
        """
        if not self._layer_types:
            return self._mask(positions, length, self._window)
        return {
            kind: self._mask(positions, length, self._window if kind == "sliding_attention" else None)
            for kind in self._layer_types
        }

    def _mask(self, positions: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
        rows = positions[:, None, :, None]
        if self._counts_only:
            return rows + 1
        columns = torch.arange(length, device=positions.device)
        seen = columns <= rows
        if window is not None:
            seen = seen & (columns > rows - window)
        hidden = torch.full((), torch.finfo(self._dtype).min, dtype=self._dtype, device=positions.device)
        return torch.where(seen, torch.zeros_like(hidden), hidden)
