"""Laws of the memory plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from specpair.errors import InvalidRequestError, ModelLoadError
from specpair_runtime.plan import estimate

DEMO = Path(__file__).parents[2] / "models" / "demo" / "target"
# Elements that one of two processes has of the demo pair's target, counted after loading it under torchrun.
HALF = 4_659_456


def test_a_process_has_its_share():
    """Weights as transformers splits them, half of a slot, and no format that cannot be split; buffers are whole."""
    alone, shared = estimate(str(DEMO)), estimate(str(DEMO), parallel=2, memory=[24 * 10**9])
    whole = {one.name: one for one in alone.formats}
    assert (alone.parallel, shared.parallel) == (1, 2)
    assert [one.name for one in shared.formats] == ["fp32", "bf16"]
    for one, size in zip(shared.formats, (4, 2), strict=True):
        assert HALF * size <= one.weights <= (HALF + 1024) * size
        assert one.slot * 2 == whole[one.name].slot
        assert shared.fits[24 * 10**9][one.name] == int((24e9 * 0.9 - one.weights) // one.slot)


def test_what_cannot_be_shared():
    """A size that the processes cannot share is named, and so is a number of processes that is none."""
    with pytest.raises(ModelLoadError, match="intermediate_size"):
        estimate(str(DEMO), parallel=3)
    with pytest.raises(InvalidRequestError, match="parallel"):
        estimate(str(DEMO), parallel=0)
