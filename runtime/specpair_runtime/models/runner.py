"""Forward passes of a model over its slot cache.

One call covers a contiguous range of slots with the same number of rows each. The shapes are few: batch sizes and
attended lengths come in buckets, so that a compiled model needs one graph for each pair of them.

The attended length is part of a result's bits: the same row over 256 and over 512 positions, 256 of them masked, may
differ in the last place. So whoever needs the same bits again lets a row's own position decide its `bucket`, and
batches only what shares it. The number of sessions in a batch was measured not to matter (docs/determinism.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from specpair_runtime.models.attention import registered_name
from specpair_runtime.models.lean import LeanDecoder
from specpair_runtime.models.masks import AttentionMasks
from specpair_runtime.models.options import SdpaBackendName
from specpair_runtime.models.slot_cache import SlotCache

__all__ = ["CompileModeName", "CompileOptions", "ModelRunner"]

CompileModeName = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

_SHORTEST_LENGTH = 256
# Prompts are computed in multiples of so many rows: libraries keep what they prepare for each number of rows that they
# meet, which came to hundreds of megabytes in fp32 on a CPU.
_PREFILL_ROWS = 16
_SDPA_BACKENDS: dict[SdpaBackendName, SDPBackend] = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class CompileOptions:
    """How steps are compiled; reduce-overhead records CUDA graphs."""

    mode: CompileModeName = "default"
    fullgraph: bool = True
    freezing: bool = False
    """Whether weights become constants of the graphs, which a CPU computes with faster and no cache on disk holds."""


class ModelRunner:
    """Runs token ids through a model at explicit positions of explicit slots.

    `max_length` positions of each slot are usable; `scratch` more are there for rows that pad a step beyond them, and
    for the rows of slots that only lie between others (`parking`): no session ever attends to those.
    `vocabulary` cuts the padding of the embedding matrix off the logits. A `deterministic` runner takes all slots into
    every step, so that its shape never depends on who else is there. `lean` computes in place of the model's own code.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_length: int,
        scratch: int,
        vocabulary: int,
        compile_: CompileOptions | None = None,
        sdpa_backend: SdpaBackendName = "auto",
        deterministic: bool = False,
        lean: LeanDecoder | None = None,
    ) -> None:
        self.model = model
        self._lean = lean
        self.device: torch.device = model.device
        self.slots = slots
        self.max_length = max_length
        self.scratch = scratch
        self.parking = max_length
        self.vocabulary = vocabulary
        self.compiled = compile_ is not None
        self._deterministic = deterministic
        # FlashAttention reads as far as each slot's length by itself: it needs no shorter view and no mask.
        self._flash = model.config._attn_implementation == registered_name("flash_attention_2")
        self._sdpa_backend = _SDPA_BACKENDS.get(sdpa_backend)
        capacity = -(-(max_length + scratch) // 64) * 64
        self._cache = SlotCache(model.config, slots, capacity, self.device, columns=lean is not None and lean.columns)
        self._masks = AttentionMasks(model.config, model.dtype, counts_only=self._flash)
        self._step = self._logits
        if compile_ is not None:
            # One graph per batch and length bucket: more than dynamo allows by default.
            torch._dynamo.config.recompile_limit = 256
            torch._inductor.config.freezing = compile_.freezing
            mode = None if compile_.mode == "default" else compile_.mode
            self._step = torch.compile(self._logits, fullgraph=compile_.fullgraph, dynamic=False, mode=mode)

    def batch_buckets(self) -> list[int]:
        """Batch sizes that `slot_range` returns: powers of two, and all slots."""
        if self._deterministic:
            return [self.slots]
        sizes = [1 << power for power in range(self.slots.bit_length()) if 1 << power < self.slots]
        return [*sizes, self.slots]

    def length_buckets(self) -> list[int]:
        """Attended lengths in positions: doubling from 256 on, and the whole cache."""
        if self._flash:
            return [self._cache.positions]
        sizes = []
        size = _SHORTEST_LENGTH
        while size < self._cache.positions:
            sizes.append(size)
            size *= 2
        return [*sizes, self._cache.positions]

    def bucket(self, start: int, rows: int = 1) -> int:
        """The least attended length in which `rows` rows from position `start` on see all that is before them."""
        return next(length for length in self.length_buckets() if length >= start + rows)

    def slot_range(self, slots: Sequence[int]) -> range:
        """The smallest bucket of neighbouring slots that covers all the given ones.

        A compiled model always starts at slot 0, because the start is part of its graph.
        """
        first = 0 if self.compiled else min(slots)
        size = next(size for size in self.batch_buckets() if size > max(slots) - first)
        first = min(first, self.slots - size)
        return range(first, first + size)

    @torch.inference_mode()
    def logits(self, first_slot: int, token_ids: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
        """Decodes `token_ids` ([batch, rows], int64), row j of slot `first_slot + b` at position `starts[b] + j`.

        `length` is the `bucket` of the sessions that matter. A slot whose rows start at 0 is cleared before. Returns
        logits of [batch, rows, vocabulary] in the model's dtype, on its device.
        """
        for row, start in enumerate(starts.tolist()):
            if start == 0:
                self._cache.clear(first_slot + row)
        # A copy made here is an inference tensor whatever was given: what was compiled is for those.
        ids = token_ids.to(self.device, copy=self.compiled)
        with self._kernels():
            return self._step(first_slot, ids, self._positions(token_ids, starts), length)

    @torch.inference_mode()
    def eager_logits(self, first_slot: int, token_ids: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
        """As `logits`, never compiled."""
        with self._kernels():
            return self._logits(first_slot, token_ids.to(self.device), self._positions(token_ids, starts), length)

    @torch.inference_mode()
    def reference_logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits of [batch, rows, vocabulary] for whole sequences, with no cache and the model's own attention."""
        configured = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            logits: torch.Tensor = self.model(input_ids=token_ids.to(self.device), use_cache=False).logits
        finally:
            self.model.set_attn_implementation(configured)
        return logits[..., : self.vocabulary]

    @torch.inference_mode()
    def prefill(self, slot: int, token_ids: Sequence[int], start: int) -> None:
        """Writes the KV of `token_ids` at positions from `start` on, without logits; never compiled.

        The slot is cleared before when `start` is 0. Some positions behind the last one may be written too: nothing
        attends to them before they are written again.
        """
        if start == 0:
            self._cache.clear(slot)
        rows = min(-(-len(token_ids) // _PREFILL_ROWS) * _PREFILL_ROWS, self._cache.positions - start)
        ids = torch.tensor([[*token_ids, *[0] * (rows - len(token_ids))]])
        positions = self._positions(ids, torch.tensor([start]))
        length = self.bucket(start, len(token_ids))
        with self._kernels():
            self._forward(slot, ids.to(self.device), positions, length, logits=False)

    def _kernels(self) -> AbstractContextManager[None]:
        return nullcontext() if self._sdpa_backend is None else sdpa_kernel(self._sdpa_backend)

    def _positions(self, token_ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return (starts[:, None] + torch.arange(token_ids.shape[1])).to(self.device)

    def _logits(self, first_slot: int, token_ids: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        return self._forward(first_slot, token_ids, positions, length, logits=True)[..., : self.vocabulary]

    def _forward(
        self, first_slot: int, token_ids: torch.Tensor, positions: torch.Tensor, length: int, *, logits: bool
    ) -> torch.Tensor:
        """Logits, or hidden states where the KV alone is wanted."""
        view = self._cache.view
        view.positions, view.first_slot, view.length = positions, first_slot, length
        masks = self._masks.build(positions, length)
        if self._lean is not None:
            return (self._lean.logits if logits else self._lean.hidden)(token_ids, masks, self._cache)
        model: Any = self.model if logits else self.model.base_model
        output = model(
            input_ids=token_ids,
            attention_mask=masks,
            # Rows that pad a step may stand beyond the last position that the model knows.
            position_ids=positions.clamp(max=self.max_length - 1),
            past_key_values=self._cache,
            use_cache=True,
        )
        result: torch.Tensor = output[0]
        return result
