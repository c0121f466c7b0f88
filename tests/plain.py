"""Sampling once more, in the plainest way: noise in Python integers, processors of transformers, one row at a time."""

from __future__ import annotations

import math

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specpair_runtime.sampling.params import SamplingParams

_ALL = 2**32 - 1


def mix(x: int) -> int:
    """The hash of 32 bits that the definition of the noise names."""
    x ^= x >> 16
    x = x * 0x21F0AAAD & _ALL
    x ^= x >> 15
    x = x * 0x735A2D97 & _ALL
    return x ^ x >> 15


def uniform(seed: int, position: int, id_: int, stream: int = 0) -> float:
    """The uniform noise of a place; any integer with the same 64 low bits is the same seed."""
    key = mix(mix(seed & _ALL) + (seed >> 32 & _ALL) & _ALL) ^ (stream * 0x85EBCA6B & _ALL)
    a = mix(key + position & _ALL)
    b = mix(a ^ 0x9E3779B9)
    return (mix(mix(id_ + a & _ALL) + b & _ALL) + 0.5) / 2**32


def gumbel(seed: int, position: int, id_: int, stream: int = 0) -> float:
    """The Gumbel noise of a place."""
    return -math.log(-math.log(uniform(seed, position, id_, stream)))


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What transformers' own processors make of logits of [rows, vocabulary]."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        processors.append(MinPLogitsWarper(params.min_p))
    scores: torch.Tensor = processors(torch.zeros((len(logits), 1), dtype=torch.int64), logits)
    return scores


def choose(logits: torch.Tensor, position: int, params: SamplingParams) -> int:
    """The token for a position, from logits of [vocabulary]."""
    if params.temperature == 0:
        return int(logits.argmax())
    scores = warped(logits[None].float(), params)[0].tolist()
    sums = [score + gumbel(params.seed, position, id_) for id_, score in enumerate(scores)]
    return sums.index(max(sums))
