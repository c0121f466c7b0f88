"""Sampling parameters: of one session, and of a batch as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["GREEDY", "SamplingBatch", "SamplingParams"]


@dataclass(frozen=True)
class SamplingParams:
    """How one session chooses its tokens; the defaults change nothing.

    Temperature 0 is greedy. `seed` is a 64-bit pattern, held signed. `rejection` selects the rejection rule in place of
    the coupled one. What needs the session's history is applied by `TokenHistory`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    rejection: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether the logits depend on the session's own tokens or ids."""
        return self.penalizes or bool(self.logit_bias) or self.min_new_tokens > 0

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there before are penalized."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


GREEDY = SamplingParams()


@dataclass(frozen=True)
class SamplingBatch:
    """The parameters of several sessions, one row each; every tensor is [batch].

    What a step can leave out is known on the host, `sampled` being the rows that are not greedy: nothing on the device
    has to be waited for.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    rejection: torch.Tensor
    sampled: tuple[int, ...]
    largest_top_k: int
    any_top_p: bool
    any_min_p: bool
    any_rejection: bool

    @property
    def any_sampled(self) -> bool:
        """Whether any session is not greedy."""
        return bool(self.sampled)

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], device: torch.device) -> SamplingBatch:
        """Packs parameters onto a device."""
        # Greedy rows are the same under both rules, and nothing is cut off them, whatever they ask for.
        rows = [GREEDY if params.greedy else params for params in rows]
        sampled = [params for params in rows if not params.greedy]
        return cls(
            temperature=torch.tensor([params.temperature for params in rows], dtype=torch.float32, device=device),
            top_k=torch.tensor([params.top_k for params in rows], dtype=torch.int64, device=device),
            top_p=torch.tensor([params.top_p for params in rows], dtype=torch.float32, device=device),
            min_p=torch.tensor([params.min_p for params in rows], dtype=torch.float32, device=device),
            seed=torch.tensor([params.seed for params in rows], dtype=torch.int64, device=device),
            rejection=torch.tensor([params.rejection for params in rows], dtype=torch.bool, device=device),
            sampled=tuple(row for row, params in enumerate(rows) if not params.greedy),
            largest_top_k=max((params.top_k for params in sampled), default=0),
            any_top_p=any(params.top_p < 1.0 for params in sampled),
            any_min_p=any(params.min_p > 0.0 for params in sampled),
            any_rejection=any(params.rejection for params in sampled),
        )
