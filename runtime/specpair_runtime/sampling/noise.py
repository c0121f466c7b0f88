"""Seeded Gumbel noise without generator state.

The noise at a place is a pure function of (seed, position, token id), so a draft and a target, in whatever order and
on whatever machine they look, see the same noise. Definition, all integers modulo 2**32:

    mix(x):  x ^= x >> 16;  x *= 0x21f0aaad;  x ^= x >> 15;  x *= 0x735a2d97;  x ^= x >> 15
    a = mix(mix(mix(low(seed)) + high(seed)) + position)
    b = mix(a ^ 0x9e3779b9)
    h = mix(mix(id + a) + b)
    u = (h + 1/2) / 2**32
    noise = -ln(-ln(u))          in double precision

`mix` is a multiply-xorshift hash with constants from the search known as "hash prospector" (C. Wellons); two keyed
rounds keep the streams of different positions apart even where one key collides. argmax(logits / T + noise) is an exact
draw from softmax(logits / T): the Gumbel-max trick (Gumbel 1954; Maddison, Tarlow, Minka 2014).
"""

from __future__ import annotations

import torch

__all__ = ["gumbel_noise"]

_MASK = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The hash of each element; int64 in and out, values in [0, 2**32)."""
    # Products of two 32-bit numbers wrap modulo 2**64, which leaves their low 32 bits right.
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Noise of [..., vocabulary] in float64 for `seeds` and `positions` of one shape [...], int64.

    A seed is any 64-bit pattern, held in int64.
    """
    low, high = seeds & _MASK, (seeds >> 32) & _MASK
    a = _mix((_mix((_mix(low) + high) & _MASK) + positions) & _MASK)[..., None]
    b = _mix(a ^ 0x9E3779B9)
    ids = torch.arange(vocabulary, device=seeds.device)
    h = _mix((_mix((ids + a) & _MASK) + b) & _MASK)
    u = (h.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log(u))
