"""Sampling parameters of a batch as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["GREEDY", "SamplingBatch", "SamplingParams"]


@dataclass(frozen=True)
class SamplingParams:
    """How one session chooses its tokens.

    Temperature 0 is greedy. `top_k` 0 and `top_p` 1 keep everything. `seed` is a 64-bit pattern, held signed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature == 0.0


GREEDY = SamplingParams()


@dataclass(frozen=True)
class SamplingBatch:
    """The parameters of several sessions, one row each; every tensor is [batch]."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seed: torch.Tensor
    any_sampled: bool
    any_top_k: bool
    any_top_p: bool

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], device: torch.device) -> SamplingBatch:
        """Packs parameters onto a device."""
        sampled = [params for params in rows if not params.greedy]
        return cls(
            temperature=torch.tensor([params.temperature for params in rows], dtype=torch.float32, device=device),
            top_k=torch.tensor([params.top_k for params in rows], dtype=torch.int64, device=device),
            top_p=torch.tensor([params.top_p for params in rows], dtype=torch.float32, device=device),
            seed=torch.tensor([params.seed for params in rows], dtype=torch.int64, device=device),
            any_sampled=bool(sampled),
            any_top_k=any(params.top_k > 0 for params in sampled),
            any_top_p=any(params.top_p < 1.0 for params in sampled),
        )
