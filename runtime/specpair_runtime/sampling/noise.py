"""Seeded noise without generator state.

The noise at a place is a pure function of (seed, stream, position, token id), so a draft and a target, in whatever
order and on whatever machine they look, see the same noise. Definition, all integers modulo 2**32:

    mix(x):  x ^= x >> 16;  x *= 0x21f0aaad;  x ^= x >> 15;  x *= 0x735a2d97;  x ^= x >> 15
    k = mix(mix(low(seed)) + high(seed)) ^ (stream * 0x85ebca6b)
    a = mix(k + position)
    b = mix(a ^ 0x9e3779b9)
    h = mix(mix(id + a) + b)
    u = (h + 1/2) / 2**32        uniform in (0, 1), in double precision
    g = -ln(-ln(u))              standard Gumbel, in double precision

`mix` is a multiply-xorshift hash with constants from the search known as "hash prospector" (C. Wellons); two keyed
rounds keep the streams of different positions apart even where one key collides. argmax(logits / T + g) is an exact
draw from softmax(logits / T): the Gumbel-max trick (Gumbel 1954; Maddison, Tarlow, Minka 2014).
"""

from __future__ import annotations

from enum import IntEnum

import torch

__all__ = ["Stream", "gumbel_noise", "uniform_noise"]

_MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """Independent noises under one seed."""

    TARGET = 0
    """The target's choices, and a coupled draft's guesses at them."""
    DRAFT = 1
    """A draft's own samples under the rejection rule, which must not share noise with the target."""
    ACCEPT = 2
    """The coin of the rejection rule, at id 0."""
    RESIDUAL = 3
    """The replacement of a rejected token."""


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The hash of each element; int64 in and out, values in [0, 2**32)."""
    # Products of two 32-bit numbers wrap modulo 2**64, which leaves their low 32 bits right.
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def uniform_noise(
    seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int, stream: Stream = Stream.TARGET
) -> torch.Tensor:
    """Uniform noise of [..., vocabulary] in float64 for `seeds` and `positions` of one shape [...], int64.

    A seed is any 64-bit pattern, held in int64.
    """
    low, high = seeds & _MASK, (seeds >> 32) & _MASK
    key = _mix((_mix(low) + high) & _MASK) ^ ((stream * 0x85EBCA6B) & _MASK)
    a = _mix((key + positions) & _MASK)[..., None]
    b = _mix(a ^ 0x9E3779B9)
    ids = torch.arange(vocabulary, device=seeds.device)
    h = _mix((_mix((ids + a) & _MASK) + b) & _MASK)
    return (h.to(torch.float64) + 0.5) * 2.0**-32


def gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int, stream: Stream = Stream.TARGET
) -> torch.Tensor:
    """Gumbel noise of [..., vocabulary] in float64, arguments as for `uniform_noise`."""
    return -torch.log(-torch.log(uniform_noise(seeds, positions, vocabulary, stream)))
