"""A draft of the rejection rule, one session at a time."""

from __future__ import annotations

import torch

from specpair_runtime.sampling.params import SamplingBatch
from specpair_runtime.sampling.rejection import SparseProbs, sample_drafts, sparse


def propose_by_rejection(
    scores: torch.Tensor, position: torch.Tensor, params: SamplingBatch
) -> tuple[int, SparseProbs]:
    """One session's sample and its distribution; arguments as for `sample_drafts`, with a batch of one."""
    drafted = sample_drafts(scores, position, params)
    return int(drafted.ids), sparse(drafted.support[0].tolist(), drafted.probs[0].tolist())
