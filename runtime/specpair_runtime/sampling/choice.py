"""Choosing tokens from scores: greedy, or coupled sampling by the Gumbel-max trick with shared noise."""

from __future__ import annotations

import torch

from specpair_runtime.sampling.noise import Stream, gumbel_noise
from specpair_runtime.sampling.params import SamplingBatch
from specpair_runtime.sampling.processors import process

__all__ = ["choose", "sample"]


def choose(logits: torch.Tensor, positions: torch.Tensor, params: SamplingBatch) -> torch.Tensor:
    """The token that each row chooses, [batch, rows], int64.

    `logits` is [batch, rows, vocabulary] of any float dtype, `positions` [batch, rows] the positions that the chosen
    tokens will take. A sampled choice is argmax(scores + noise(seed, position, id)): an exact draw from the processed
    distribution that a draft with the same noise reproduces wherever its own distribution is close (Daliri, Musco,
    Suresh 2024, arXiv:2408.07978). The lowest id wins a tie.
    """
    logits = logits.to(torch.float32)
    if not params.any_sampled:
        return logits.argmax(dim=-1)
    return sample(process(logits, params), positions, params)


def sample(
    scores: torch.Tensor, positions: torch.Tensor, params: SamplingBatch, stream: Stream = Stream.TARGET
) -> torch.Tensor:
    """Draws from softmax(scores) in sampled sessions, takes the maximum in greedy ones; shapes as for `choose`."""
    noise = gumbel_noise(params.seed[:, None].expand_as(positions), positions, scores.shape[-1], stream)
    sampled = (params.temperature > 0)[:, None, None]
    return (scores.to(torch.float64) + torch.where(sampled, noise, 0.0)).argmax(dim=-1)
