"""Choosing tokens from scores: greedy, or coupled sampling by the Gumbel-max trick with shared noise."""

from __future__ import annotations

import torch

from specpair_runtime.sampling.noise import Stream, gumbel_noise
from specpair_runtime.sampling.params import SamplingBatch
from specpair_runtime.sampling.processors import process

__all__ = ["choose", "most_probable", "sample"]

# A share of the vocabulary: one in so many.
_FEW = 4


def choose(logits: torch.Tensor, positions: torch.Tensor, params: SamplingBatch) -> torch.Tensor:
    """The token that each row chooses, [batch, rows], int64.

    `logits` is [batch, rows, vocabulary] of any float dtype, `positions` [batch, rows] the positions that the chosen
    tokens will take. A sampled choice is argmax(scores + noise(seed, position, id)): an exact draw from the processed
    distribution that a draft with the same noise reproduces wherever its own distribution is close (Daliri, Musco,
    Suresh 2024, arXiv:2408.07978). The lowest id wins a tie.
    """
    if not params.any_sampled:
        return most_probable(logits)
    return sample(process(logits.to(torch.float32), params), positions, params)


def most_probable(scores: torch.Tensor) -> torch.Tensor:
    """The lowest of the ids with the highest score, [...], of scores [..., vocabulary]."""
    # Not argmax, which takes five times as long for bf16 on a CPU.
    return scores.max(dim=-1).indices


def sample(
    scores: torch.Tensor, positions: torch.Tensor, params: SamplingBatch, stream: Stream = Stream.TARGET
) -> torch.Tensor:
    """Draws from softmax(scores) in sampled sessions, takes the maximum in greedy ones; shapes as for `choose`."""
    seeds = params.seed[:, None].expand_as(positions)
    if len(params.sampled) == len(scores):
        return _perturbed(scores, seeds, positions, stream)
    choices = most_probable(scores)
    if params.any_sampled:
        rows = torch.tensor(params.sampled, device=scores.device)
        choices[rows] = _perturbed(scores[rows], seeds[rows], positions[rows], stream)
    return choices


def _perturbed(scores: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, stream: Stream) -> torch.Tensor:
    """argmax(scores + noise), [batch, rows]."""
    vocabulary = scores.shape[-1]
    # Noise costs more than finding out that processors have left few ids, unless a device has to be waited for.
    left = int((scores > -torch.inf).sum(dim=-1).max()) if scores.device.type == "cpu" else vocabulary
    if left > vocabulary // _FEW:
        return most_probable(gumbel_noise(seeds, positions, vocabulary, stream).add_(scores))
    # In order of the ids, so that the lowest wins a tie here too.
    ids = scores.topk(max(left, 1), dim=-1).indices.sort(dim=-1).values
    best = most_probable(gumbel_noise(seeds, positions, ids, stream).add_(scores.gather(-1, ids)))
    return ids.gather(-1, best[..., None])[..., 0]
