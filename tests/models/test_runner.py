"""Steps over the slot cache: what a row computes depends on its session alone, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.runner import ModelRunner
from specpair_runtime.models.serving_model import load_serving_model
from specpair_runtime.serving import ServiceStatus

from ..tiny import FAMILIES, random_ids

SLOTS = 8
PROMPT = 40
ROWS = 48
IDS = random_ids(PROMPT + ROWS)
OTHERS = [random_ids(PROMPT + ROWS, seed=slot + 1) for slot in range(SLOTS)]
# Blocks of fewer than four rows in fp32 are left out: products of so few rows take another way when there are more of
# them, and the last bits differ.
FORMATS = [
    *(("llama", "fp32", "none", width) for width in (4, 8, 16)),
    *(("llama", "bf16", "none", width) for width in (1, 2, 4, 16)),
    *((family, dtype, "none", 8) for family in FAMILIES[1:] for dtype in ("fp32", "bf16")),
    *(("llama-blocks", "bf16", quantization, width) for quantization in ("int8", "nf4", "fp4") for width in (1, 4, 8)),
]


@pytest.fixture(scope="module", params=FORMATS, ids=lambda case: "-".join(map(str, case)))
def case(request, tiny):
    """A runner and its width, one for each format."""
    name, dtype, quantization, width = request.param
    config = ModelConfig(
        model=tiny.path(name),
        dtype=dtype,
        quantization=quantization,
        device="cpu",
        slots=SLOTS,
        max_length=300,
        threads=1,
    )
    return load_serving_model(config, [width], ServiceStatus()).runner, width


def decode(runner: ModelRunner, width: int, *, slot: int = 0, offset: int = 0, batch: int = 1) -> torch.Tensor:
    """Logits of ROWS rows in blocks of which the first has only `offset` of them, the padding being any ids.

    The session is on `slot`; in a larger `batch` from slot 0 on others run beside it, each at its own position.
    """
    runner.prefill(slot, IDS[:PROMPT], 0)
    first = 0 if batch > 1 else slot
    logits, position = [], PROMPT
    while position < len(IDS):
        count = (offset or width) if position == PROMPT else width
        rows = torch.tensor([other[position % 32 : position % 32 + width] for other in OTHERS[first : first + batch]])
        starts = torch.tensor([position + 7 * other for other in range(batch)])
        own = IDS[position : position + count]
        rows[slot - first, : len(own)] = torch.tensor(own)
        starts[slot - first] = position
        block = runner.logits(first, rows, starts, runner.bucket(position))
        logits.append(block[slot - first, : len(own)].clone())
        position += count
    return torch.cat(logits)


def kv(runner: ModelRunner, slot: int) -> torch.Tensor:
    layers = runner._cache.layers
    keys = [layer.keys[slot].mT if layer.columns else layer.keys[slot] for layer in layers]
    return torch.stack([kind[:, : len(IDS)] for kind in [*keys, *(layer.values[slot] for layer in layers)]])


@pytest.fixture(scope="module")
def expected(case):
    """Logits and cache of the session alone on slot 0, in whole blocks."""
    runner, width = case
    return decode(runner, width), kv(runner, 0)


def test_the_place_in_the_block_does_not_matter(case, expected):
    """However blocks are aligned, and whatever pads them, logits and cache have the same bits."""
    runner, width = case
    for offset in range(1, width):
        assert torch.equal(decode(runner, width, offset=offset), expected[0])
        assert torch.equal(kv(runner, 0), expected[1])


def test_the_slot_does_not_matter(case, expected):
    """On every slot the same bits."""
    runner, width = case
    for slot in range(1, SLOTS, 3):
        assert torch.equal(decode(runner, width, slot=slot), expected[0])
        assert torch.equal(kv(runner, slot), expected[1])


def test_the_company_does_not_matter(case, expected):
    """Alone or among up to seven others that are at other positions, the same bits."""
    runner, width = case
    for batch in (2, 4, 8):
        for slot in (0, batch - 1):
            assert torch.equal(decode(runner, width, slot=slot, batch=batch), expected[0])
            assert torch.equal(kv(runner, slot), expected[1])


@torch.inference_mode()
def test_what_was_in_the_slot_does_not_matter(case, expected):
    """Not even numbers that are none, which masked positions would pass on: a slot begins with zeros.

    The session is begun by a prefill, and by a block at position 0; whatever is in the slots beside it stays theirs.
    """
    runner, width = case
    for layer in runner._cache.layers:
        layer.keys[:].fill_(float("nan"))
        layer.values[:].fill_(float("inf"))
    assert torch.equal(decode(runner, width, slot=3), expected[0])
    runner._cache.layers[0].keys[3].fill_(float("nan"))
    first = torch.tensor([IDS[:width]])
    assert runner.logits(3, first, torch.tensor([0]), runner.bucket(0, width)).isfinite().all()
    for slot in range(SLOTS):
        runner._cache.clear(slot)


@pytest.fixture(scope="module")
def bare(tiny):
    """A function that makes runners that nothing was loaded or compiled for."""
    model = tiny.reference("llama").model

    def make(slots=4, max_length=300, **options):
        return ModelRunner(model, slots=slots, max_length=max_length, scratch=8, vocabulary=100, **options)

    return make


@given(slots=st.integers(1, 20), data=st.data(), deterministic=st.booleans())
def test_slot_ranges_cover_what_they_should(bare, slots, data, deterministic):
    """A range contains the given slots, lies within the slots, has the size of a bucket, and is the smallest one."""
    runner = bare(slots=slots, max_length=8, deterministic=deterministic)
    wanted = data.draw(st.lists(st.integers(0, slots - 1), min_size=1, unique=True))
    found = runner.slot_range(wanted)
    assert set(wanted) <= set(found) <= set(range(slots))
    assert len(found) in runner.batch_buckets()
    assert all(size > max(wanted) - min(wanted) for size in runner.batch_buckets() if size >= len(found))
    assert not any(max(wanted) - min(wanted) < size < len(found) for size in runner.batch_buckets())


@given(max_length=st.integers(2, 3000), data=st.data())
def test_length_buckets_hold_every_row(bare, max_length, data):
    """Every position has one attended length that contains it; lengths grow, start at 256 and end with the cache, which
    has room for a block that begins at the last position."""
    runner = bare(slots=1, max_length=max_length)
    lengths = runner.length_buckets()
    assert lengths == sorted(set(lengths))
    assert lengths[-1] >= max_length + 8
    assert len(lengths) == 1 or lengths[0] == 256
    position = data.draw(st.integers(0, max_length - 1))
    bucket = runner.bucket(position)
    assert bucket in lengths
    assert bucket > position
    assert all(length <= position for length in lengths if length < bucket)


def test_rows_that_pad_a_full_slot_stay_in_it(bare):
    """A block at a slot's last position, and the rows of slots that only lie between, write to positions that no
    session reads."""
    runner = bare(slots=2, max_length=20)
    runner.prefill(0, [1] * 20, 0)
    before = runner._cache.layers[0].keys.clone()
    starts = torch.tensor([runner.parking, 19])
    runner.logits(0, torch.ones((2, 8), dtype=torch.int64), starts, runner.bucket(19))
    after = runner._cache.layers[0].keys
    assert torch.equal(after[0, :, :20], before[0, :, :20])
    assert not torch.equal(after[0, :, 20:28], before[0, :, 20:28])


def test_logits_are_those_of_a_plain_forward_pass(tiny, case):
    """In fp32 they equal transformers' own up to rounding."""
    runner, width = case
    name = runner.model.name_or_path.rpartition("/")[2]
    if runner.model.dtype != torch.float32:
        return
    with torch.inference_mode():
        reference = tiny.reference(name).model(torch.tensor([IDS]), use_cache=False).logits[0, PROMPT:]
    torch.testing.assert_close(decode(runner, width), reference[:, : runner.vocabulary], rtol=1e-4, atol=1e-4)
