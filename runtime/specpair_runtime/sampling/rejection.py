"""The rejection rule, vectorised: `law.py` on tensors, with noise from the seed.

Leviathan, Kalman, Matias 2023 (arXiv:2211.17192), Algorithm 1; Chen et al. 2023 (arXiv:2302.01318), Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specpair_runtime.sampling.choice import sample
from specpair_runtime.sampling.noise import Stream, uniform_noise
from specpair_runtime.sampling.params import SamplingBatch

__all__ = [
    "MAX_SUPPORT",
    "Drafted",
    "SparseProbs",
    "judge_by_rejection",
    "sample_drafts",
    "sparse",
]

# Ids that a draft may sample from at a position: what it truncates its own distribution to.
MAX_SUPPORT = 64


@dataclass(frozen=True)
class SparseProbs:
    """A distribution over a few ids; all others have probability 0. It sums to 1."""

    token_ids: Sequence[int]
    probs: Sequence[float]


@dataclass(frozen=True)
class Drafted:
    """A draft's own samples, on the device, and exactly the distributions that they were drawn from.

    `ids` is [batch, 1]; `support` and `probs` are [batch, ids], where an id of probability 0 is not in the support.
    """

    ids: torch.Tensor
    support: torch.Tensor
    probs: torch.Tensor


def sample_drafts(scores: torch.Tensor, positions: torch.Tensor, params: SamplingBatch) -> Drafted:
    """Samples one id for each session; what a greedy one gets is its most probable id.

    `scores` is [batch, 1, vocabulary], processed; `positions` [batch, 1]. A distribution is cut to its `MAX_SUPPORT`
    most probable ids and normalised before the draw, so that what is sent is what was sampled.
    """
    top = scores.topk(min(MAX_SUPPORT, scores.shape[-1]), dim=-1)
    probs = top.values.softmax(dim=-1)
    cut = torch.full_like(scores, -torch.inf).scatter(-1, top.indices, probs.log())
    return Drafted(sample(cut, positions, params, Stream.DRAFT), top.indices[:, 0], probs[:, 0])


def sparse(support: Sequence[int], probs: Sequence[float]) -> SparseProbs:
    """A distribution of `Drafted`, on the host."""
    kept = [(token_id, prob) for token_id, prob in zip(support, probs, strict=True) if prob > 0]
    return SparseProbs([token_id for token_id, _ in kept], [prob for _, prob in kept])


def judge_by_rejection(
    scores: torch.Tensor,
    proposed: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    params: SamplingBatch,
    draft_probs: Sequence[Sequence[SparseProbs]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each proposal is accepted, and the target's token where a block ends at a row.

    `scores` is [batch, rows, vocabulary], processed; `proposed` [batch, rows - 1], of which `counts[b]` are proposals;
    `draft_probs` holds one distribution for each of those, or none at all for a session whose proposer is certain of
    what it proposes, as prompt lookup is. Returns accepted [batch, rows - 1], bool, and choices [batch, rows]: the
    residual's draw at a row that a proposal follows, the target's own at the row behind the last one.
    """
    target = scores.softmax(dim=-1)  # [batch, rows, vocabulary]
    draft = _dense(proposed, draft_probs, target.shape[-1])  # [batch, rows - 1, vocabulary]
    target_prob = target[:, :-1].gather(-1, proposed[..., None])[..., 0]  # [batch, rows - 1]
    draft_prob = draft.gather(-1, proposed[..., None])[..., 0]
    seeds = params.seed[:, None].expand_as(positions)
    coin = uniform_noise(seeds, positions, 1, Stream.ACCEPT)[:, :-1, 0]  # in (0, 1)
    # coin < min(1, target / draft), without the division.
    accepted = coin * draft_prob < target_prob

    residual = (target[:, :-1] - draft).clamp(min=0)
    # Where rounding leaves no residual the two distributions are the same, and the target's own will do.
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, target[:, :-1])
    replaced = sample(residual.log(), positions[:, :-1], params, Stream.RESIDUAL)
    own = sample(scores, positions, params)
    columns = torch.arange(proposed.shape[1], device=proposed.device)
    choices = torch.where(columns < counts[:, None], replaced, own[:, :-1])
    return accepted, torch.cat([choices, own[:, -1:]], dim=1)


def _dense(proposed: torch.Tensor, draft_probs: Sequence[Sequence[SparseProbs]], vocabulary: int) -> torch.Tensor:
    dense = torch.zeros((*proposed.shape, vocabulary), device=proposed.device)
    certain = torch.tensor([not given for given in draft_probs], device=proposed.device)
    dense.scatter_(-1, proposed[..., None], certain[:, None, None].expand(*proposed.shape, 1).float())
    places = [
        (row, column, token_id, prob)
        for row, given in enumerate(draft_probs)
        for column, distribution in enumerate(given)
        for token_id, prob in zip(distribution.token_ids, distribution.probs, strict=True)
    ]
    if places:
        rows, columns, ids, probs = zip(*places, strict=True)
        index = torch.tensor([rows, columns, ids], device=proposed.device)
        dense[index[0], index[1], index[2]] = torch.tensor(probs, device=proposed.device)
    return dense
