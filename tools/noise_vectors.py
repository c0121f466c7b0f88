"""Generates docs/noise_vectors.json, the test vectors of the noise: `python tools/noise_vectors.py [--output FILE]`.

An implementation of docs/noise.md of its own, in Python's integers and decimals: it shares no code with the services,
and every number in the file is correctly rounded whatever the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from decimal import Decimal, localcontext
from itertools import product
from pathlib import Path
from typing import NamedTuple

STREAMS = {"TARGET": 0, "DRAFT": 1, "ACCEPT": 2, "RESIDUAL": 3}
# The corners of every argument, then places as they come in ordinary use.
EDGE_SEEDS = (0, 1, 2**32 - 1, 2**63, 2**64 - 1)
EDGE_POSITIONS = (0, 1, 4095, 2**31)
EDGE_IDS = (0, 1, 151_935)
ORDINARY = ((42, 17, 50_256), (20_240_817, 1000, 2), (0x0123456789ABCDEF, 777, 31_999), (2**53 + 1, 131_071, 128_000))

_MASK = 0xFFFFFFFF
# Digits of the logarithms before they are rounded to a double.
_DIGITS = 40


class Vector(NamedTuple):
    """The noise at one place. The seed is a decimal string: many JSON readers hold numbers as doubles."""

    seed: str
    stream: int
    position: int
    id: int
    hash: int
    uniform: float
    gumbel: float


def mix(x: int) -> int:
    """A bijection of 32-bit integers that spreads every input bit over all output bits."""
    x ^= x >> 16
    x = x * 0x21F0AAAD & _MASK
    x ^= x >> 15
    x = x * 0x735A2D97 & _MASK
    return x ^ (x >> 15)


def noise_hash(seed: int, stream: int, position: int, token_id: int) -> int:
    """The 32 bits of noise at a place; `seed` is in [0, 2**64)."""
    low, high = seed & _MASK, seed >> 32
    key = mix((mix(low) + high) & _MASK) ^ (stream * 0x85EBCA6B & _MASK)
    a = mix((key + position) & _MASK)
    b = mix(a ^ 0x9E3779B9)
    return mix((mix((token_id + a) & _MASK) + b) & _MASK)


def vector(seed: int, stream: int, position: int, token_id: int) -> Vector:
    """The test vector of one place."""
    hash_ = noise_hash(seed, stream, position, token_id)
    with localcontext() as context:
        context.prec = _DIGITS
        uniform = Decimal(2 * hash_ + 1) / 2**33
        gumbel = -(-uniform.ln()).ln()
    return Vector(str(seed), stream, position, token_id, hash_, float(uniform), float(gumbel))


def vectors() -> Iterator[Vector]:
    """All test vectors, in the order of the file."""
    for place in product(EDGE_SEEDS, STREAMS.values(), EDGE_POSITIONS, EDGE_IDS):
        yield vector(*place)
    for (seed, position, token_id), stream in product(ORDINARY, STREAMS.values()):
        yield vector(seed, stream, position, token_id)


def render() -> str:
    """The file's text: a JSON list, one vector on each line."""
    lines = ",\n".join(f"  {json.dumps(entry._asdict())}" for entry in vectors())
    return f"[\n{lines}\n]\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parent.parent / "docs" / "noise_vectors.json"
    parser.add_argument("--output", type=Path, default=default)
    parser.parse_args().output.write_text(render())
