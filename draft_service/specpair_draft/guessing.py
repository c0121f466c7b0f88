"""Choosing guesses: as the target would choose, or as a draft of the rejection rule samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specpair_runtime.sampling.choice import choose, sample
from specpair_runtime.sampling.params import SamplingBatch
from specpair_runtime.sampling.processors import process
from specpair_runtime.sampling.rejection import Drafted, sample_drafts

__all__ = ["Guess", "guess"]


@dataclass(frozen=True)
class Guess:
    """One guess for each slot of a step, on the device.

    `ids` is [batch, 1], int64. `confidence`, [batch, 1], is the draft's own probability of each; None if nobody asked.
    `drafted` is what the sessions of the rejection rule sampled from; None without such sessions.
    """

    ids: torch.Tensor
    confidence: torch.Tensor | None = None
    drafted: Drafted | None = None


def guess(
    logits: torch.Tensor, positions: torch.Tensor, params: SamplingBatch, *, all_rejection: bool, confident: bool
) -> Guess:
    """Chooses one id for each row of `logits`, [batch, 1, vocabulary], at `positions`, [batch, 1].

    Coupled sessions take the target's noise (Daliri, Musco, Suresh 2024, arXiv:2408.07978), those of the rejection rule
    a draft's own (Leviathan et al. 2023, arXiv:2211.17192, Algorithm 1); with `all_rejection` there are no others. The
    confidence is softmax of the processed scores, unscaled ones in a greedy session. Waits for nothing on the device.
    """
    if not (params.any_rejection or confident):
        return Guess(choose(logits, positions, params))
    scores = logits.to(torch.float32)
    if params.any_sampled:
        scores = process(scores, params)
    drafted = sample_drafts(scores, positions, params) if params.any_rejection else None
    if drafted is not None and all_rejection:
        ids = drafted.ids
    else:
        ids = sample(scores, positions, params)
        if drafted is not None:
            ids = torch.where(params.rejection[:, None], drafted.ids, ids)
    confidence = None
    if confident:
        confidence = (scores.gather(-1, ids[..., None])[..., 0] - scores.logsumexp(dim=-1)).exp()
    return Guess(ids, confidence, drafted)
