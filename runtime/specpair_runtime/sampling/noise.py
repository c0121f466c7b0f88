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


def uniform_noise(
    seeds: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor | int, stream: Stream = Stream.TARGET
) -> torch.Tensor:
    """Uniform noise of [..., ids] in float64 for `seeds` and `positions` of one shape [...], int64.

    A seed is any 64-bit pattern, held in int64. `ids` is [ids], the same everywhere, or [..., ids], or the size of a
    vocabulary, of which all are meant.
    """
    if isinstance(ids, int):
        ids = torch.arange(ids, device=seeds.device)
    low, high = seeds.to(torch.int32), (seeds >> 32).to(torch.int32)
    key = _mix(_mix(low) + high) ^ _signed(stream * 0x85EBCA6B)
    a = _mix(key + positions.to(torch.int32))[..., None]
    b = _mix(a ^ _signed(0x9E3779B9))
    h = _mix(_mix(ids.to(torch.int32) + a).add_(b))
    middle = h.to(torch.float64).add_(0.5)
    # The pattern read as an unsigned number.
    return torch.where(h < 0, middle + 2.0**32, middle).mul_(2.0**-32)


def gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor | int, stream: Stream = Stream.TARGET
) -> torch.Tensor:
    """Gumbel noise of [..., ids] in float64, arguments as for `uniform_noise`."""
    return uniform_noise(seeds, positions, ids, stream).log_().neg_().log_().neg_()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The hash of each element; 32-bit patterns in int32, in and out."""
    # Sums and products wrap; a shift to the right brings in copies of the sign, which are masked away.
    x = x ^ ((x >> 16) & 0xFFFF)
    x *= _signed(0x21F0AAAD)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x735A2D97)
    x ^= (x >> 15) & 0x1FFFF
    return x


def _signed(pattern: int) -> int:
    """The low 32 bits as int32 holds them."""
    low = pattern & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low
