"""The noise is what docs/noise.md says, to the bit."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from specpair_runtime.sampling.noise import Stream, gumbel_noise, uniform_noise

ROOT = Path(__file__).resolve().parents[2]
VECTORS = json.loads((ROOT / "docs/noise_vectors.json").read_text())


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("noise_vectors", ROOT / "tools/noise_vectors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def signed(seed):
    """A 64-bit pattern as int64 holds it."""
    return int(seed) - 2**64 if int(seed) >= 2**63 else int(seed)


def test_the_committed_file_is_what_the_tool_writes(tool):
    """Generating again gives the committed vectors, byte for byte."""
    assert (ROOT / "docs/noise_vectors.json").read_text() == tool.render(), "run `python tools/noise_vectors.py`"


def test_every_stream_and_every_corner_has_a_vector(tool):
    """The file covers each stream, and the least and the largest value of each argument."""
    assert {stream.name: stream.value for stream in Stream} == tool.STREAMS
    assert {vector["stream"] for vector in VECTORS} == set(Stream)
    assert {int(vector["seed"]) for vector in VECTORS} >= {0, 1, 2**32 - 1, 2**63, 2**64 - 1}
    assert {vector["position"] for vector in VECTORS} >= {0, 1, 4095, 2**31}
    assert {vector["id"] for vector in VECTORS} >= {0, 1, 151_935}


def test_noise_equals_the_vectors():
    """Hash and uniform number are equal to the bit, the Gumbel number to 1e-12."""
    by_size = defaultdict(list)
    for vector in VECTORS:
        by_size[vector["id"] + 1, vector["stream"]].append(vector)
    for (vocabulary, stream), vectors in by_size.items():
        seeds = torch.tensor([signed(vector["seed"]) for vector in vectors])
        positions = torch.tensor([vector["position"] for vector in vectors])
        uniform = uniform_noise(seeds, positions, vocabulary, Stream(stream))[:, -1]
        gumbel = gumbel_noise(seeds, positions, vocabulary, Stream(stream))[:, -1]
        assert uniform.tolist() == [vector["uniform"] for vector in vectors]
        assert (uniform * 2**32 - 0.5).tolist() == [vector["hash"] for vector in vectors]
        assert gumbel.tolist() == pytest.approx([vector["gumbel"] for vector in vectors], rel=0, abs=1e-12)


def test_noise_does_not_depend_on_its_company(tool):
    """A place has the same noise whatever shape it is computed in, and whatever else is computed beside it."""
    seeds = torch.tensor([[0, 1, -1], [2**40, -(2**63), 42]])
    positions = torch.tensor([[0, 5, 4095], [131_071, 2**31, 17]])
    together = uniform_noise(seeds, positions, 300, Stream.RESIDUAL)
    assert together.shape == (2, 3, 300)
    for row in range(2):
        for column in range(3):
            alone = uniform_noise(seeds[row, column], positions[row, column], 7, Stream.RESIDUAL)
            assert together[row, column, :7].tolist() == alone.tolist()
            seed, position = int(seeds[row, column]) % 2**64, int(positions[row, column])
            hashes = [tool.noise_hash(seed, Stream.RESIDUAL, position, id_) for id_ in range(7)]
            assert alone.tolist() == [(hash_ + 0.5) / 2**32 for hash_ in hashes]


def test_the_noise_keeps_its_bounds():
    """The least and the largest hash still give finite noise, within the bounds that the page states."""
    ends = torch.tensor([0.5, 2**32 - 0.5], dtype=torch.float64) / 2**32
    least, most = (-torch.log(-torch.log(ends))).tolist()
    assert (round(least, 2), round(most, 2)) == (-3.13, 22.87)
