"""Coupled sampling: processors, choices and acceptance, against transformers, plain Python and the distribution."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specpair_runtime.sampling.acceptance import accepted_lengths
from specpair_runtime.sampling.choice import choose
from specpair_runtime.sampling.noise import Stream, gumbel_noise, uniform_noise
from specpair_runtime.sampling.params import GREEDY, SamplingBatch, SamplingParams
from specpair_runtime.sampling.processors import process

from .. import plain
from .chi_square import chi_square

CPU = torch.device("cpu")
VOCABULARY = 17
ROWS = 3
# Least p value that fixed seeds must reach, and what a wrong distribution must fall below.
PASSES, FAILS = 1e-3, 1e-9

seeds = st.integers(-(2**63), 2**63 - 1)
temperatures = st.sampled_from([0.3, 0.7, 1.0, 1.5, 20.0])
sampled_params = st.builds(
    SamplingParams,
    temperature=temperatures,
    top_k=st.sampled_from([0, 1, 2, 5, VOCABULARY, VOCABULARY + 1, 2**32 - 1]),
    top_p=st.sampled_from([1e-9, 1e-6, 0.1, 0.5, 0.75, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    seed=seeds,
)
greedy_params = st.builds(
    SamplingParams, top_k=st.integers(0, 20), top_p=st.sampled_from([0.1, 0.9, 1.0]), min_p=st.sampled_from([0.0, 0.5])
)


@st.composite
def batches(draw):
    """Sessions with logits of some rows each, and whether those have many ties, as in low precision."""
    sessions = draw(st.lists(st.one_of(sampled_params, greedy_params), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = 3 * torch.randn((len(sessions), ROWS, VOCABULARY), generator=generator)
    step = draw(st.sampled_from([None, 0.25, 2.0]))
    return sessions, logits if step is None else (logits / step).round() * step, step is not None


def positions_of(batch, first=0):
    return torch.arange(first, first + batch * ROWS).reshape(batch, ROWS)


@settings(max_examples=60)
@given(batches())
def test_processors_are_those_of_transformers(case):
    """Whatever sessions share a step, each one's scores are those of transformers' processors in `generate`'s order,
    and the same tokens are removed. Which of several equal ones top-p keeps is nobody's rule, but how many is."""
    sessions, logits, ties = case
    scores = process(logits, SamplingBatch.of(sessions, CPU))
    for params, own, given_logits in zip(sessions, scores, logits, strict=True):
        if params.greedy:
            continue
        expected = plain.warped(given_logits, params)
        if ties:
            own, expected = own.sort(dim=-1).values, expected.sort(dim=-1).values
        assert torch.equal(own == -torch.inf, expected == -torch.inf)
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=60)
@given(batches(), st.integers(0, 2**20))
def test_choices_do_not_depend_on_the_company(case, first):
    """A session chooses in any batch what it chooses alone; a greedy one the lowest of its best ids, whatever it says
    of top-k or top-p; a sampled one what plain Python chooses."""
    sessions, logits, ties = case
    positions = positions_of(len(sessions), first)
    chosen = choose(logits, positions, SamplingBatch.of(sessions, CPU))
    for index, params in enumerate(sessions):
        own = slice(index, index + 1)
        assert torch.equal(chosen[own], choose(logits[own], positions[own], SamplingBatch.of([params], CPU)))
        if params.greedy or params.top_p == 1.0 or not ties:
            expected = [plain.choose(logits[index, row], int(positions[index, row]), params) for row in range(ROWS)]
            assert chosen[index].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_other_rule(dtype):
    """Logits of a model in low precision are chosen from as the numbers that they are."""
    logits = torch.randn((1, 40, 50), generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.arange(40)[None]
    for params in (GREEDY, SamplingParams(temperature=0.9, top_p=0.8, seed=3)):
        batch = SamplingBatch.of([params], CPU)
        assert torch.equal(choose(logits, positions, batch), choose(logits.float(), positions, batch))


# --- distribution ----------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.7),
    "hot": SamplingParams(temperature=1.5),
    "top-k": SamplingParams(temperature=1.0, top_k=5),
    "top-p": SamplingParams(temperature=1.2, top_p=0.8),
    "min-p": SamplingParams(temperature=1.2, min_p=0.1),
    "all": SamplingParams(temperature=0.9, top_k=12, top_p=0.9, min_p=0.02),
}
LOGITS = 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(4))
DRAWS = 8192


def drawn(params, positions, given_seeds):
    """Choices from LOGITS at [batch, rows] positions, with a seed for each session."""
    sessions = [
        SamplingParams(params.temperature, params.top_k, params.top_p, params.min_p, seed=int(seed))
        for seed in given_seeds
    ]
    return choose(LOGITS.expand(*positions.shape, -1), positions, SamplingBatch.of(sessions, CPU))


PLACES = {
    "seeds": (torch.full((DRAWS, 1), 1000), range(DRAWS)),
    "distant seeds": (torch.full((DRAWS, 1), 3), [seed * 0x9E3779B97F4A7C15 % 2**64 - 2**63 for seed in range(DRAWS)]),
    "positions": (torch.arange(DRAWS)[None], [42]),
    "blocks": (torch.arange(DRAWS).reshape(64, -1), range(64)),
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("params", OPTIONS.values(), ids=OPTIONS)
def test_draws_have_the_processed_distribution(params, places):
    """Over thousands of seeds, or positions, tokens have the frequencies that transformers' processors give them."""
    outcomes = drawn(params, *PLACES[places]).flatten().tolist()
    probs = plain.warped(LOGITS[None], params)[0].softmax(dim=-1).tolist()
    assert chi_square(outcomes, probs) > PASSES
    # The test could tell: a slightly warmer distribution is not taken for this one.
    warmer = (plain.warped(LOGITS[None], params)[0] * 0.8).softmax(dim=-1).tolist()
    assert chi_square(outcomes, warmer) < FAILS


@pytest.mark.parametrize("step", [1, 2, 7, 256])
def test_draws_at_two_positions_are_independent(step):
    """Under one seed, what is drawn at a position says nothing about what is drawn at another one."""
    positions = torch.arange(DRAWS)[None]
    first = drawn(OPTIONS["top-k"], positions, [5])[0]
    second = drawn(OPTIONS["top-k"], positions + step, [5])[0]
    probs = plain.warped(LOGITS[None], OPTIONS["top-k"])[0].softmax(dim=-1).tolist()
    joint = [left * right for left, right in product(probs, probs)]
    assert chi_square((first * VOCABULARY + second)[:: step + 1].tolist(), joint) > PASSES


# --- noise -----------------------------------------------------------------------------------------------------------


@given(seed=seeds, position=st.integers(0, 2**31), stream=st.sampled_from(list(Stream)))
def test_noise_is_that_of_plain_integers(seed, position, stream):
    """To the bit for uniform numbers, to the last place for Gumbel ones, whose logarithms are the machine's."""
    place = torch.tensor(seed), torch.tensor(position)
    expected = [plain.uniform(seed, position, id_, stream) for id_ in range(30)]
    assert uniform_noise(*place, 30, stream).tolist() == expected
    gumbel = [plain.gumbel(seed, position, id_, stream) for id_ in range(30)]
    assert gumbel_noise(*place, 30, stream).tolist() == pytest.approx(gumbel, rel=1e-14, abs=1e-14)


def test_uniform_noise_is_uniform():
    """Numbers of neighbouring ids, positions and seeds spread evenly over the unit interval, fine and coarse."""
    ids = uniform_noise(torch.tensor(9), torch.tensor(9), 2**16).tolist()
    places = uniform_noise(torch.tensor(9).expand(2**14), torch.arange(2**14), 4).flatten().tolist()
    many = uniform_noise(torch.arange(2**14), torch.tensor(9).expand(2**14), 4).flatten().tolist()
    for numbers in (ids, places, many):
        for scale in (1, 2**10, 2**20):
            cells = [math.floor(number * scale * 64) % 64 for number in numbers]
            assert chi_square(cells, [1 / 64] * 64) > PASSES


# --- acceptance ------------------------------------------------------------------------------------------------------


@given(data=st.data(), batch=st.integers(1, 4), width=st.integers(1, 6))
def test_accepted_lengths_are_those_of_a_loop(data, batch, width):
    """Proposals count as long as each is what the target chooses; padding never counts, even where it agrees."""
    few = st.integers(0, 2)
    choices = [data.draw(st.lists(few, min_size=width, max_size=width)) for _ in range(batch)]
    proposed = [data.draw(st.lists(few, min_size=width - 1, max_size=width - 1)) for _ in range(batch)]
    counts = [data.draw(st.integers(0, width - 1)) for _ in range(batch)]
    expected = []
    for chosen, ids, count in zip(choices, proposed, counts, strict=True):
        length = 0
        while length < count and ids[length] == chosen[length]:
            length += 1
        expected.append(length)
    shaped = torch.tensor(proposed, dtype=torch.int64).reshape(batch, width - 1)
    assert accepted_lengths(torch.tensor(choices), shaped, torch.tensor(counts)).tolist() == expected
