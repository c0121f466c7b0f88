"""Processors at every position of a block: what transformers' own do with that position's own tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specpair_runtime.sampling.history import TokenHistory, apply_histories
from specpair_runtime.sampling.params import SamplingBatch, SamplingParams
from specpair_runtime.sampling.processors import process

from ..plain import warped
from .penalties import penalties, reference_penalties, truncations

VOCABULARY = 24
CPU = torch.device("cpu")
ids = st.integers(0, VOCABULARY - 1)
histories = {
    "prompt": st.lists(ids, min_size=1, max_size=8),
    "output": st.lists(ids, max_size=12),
    "proposed": st.lists(ids, max_size=7),
    "suppressed": st.frozensets(ids, max_size=3),
    "seed": st.integers(0, 2**31),
}


def block_of(prompt, output, proposed):
    """The proposals and the positions of the tokens that a block's rows choose."""
    first = len(prompt) + len(output)
    return torch.tensor(proposed, dtype=torch.int64), torch.arange(first, first + len(proposed) + 1)


def random_logits(rows, seed):
    return torch.randn((rows, VOCABULARY), generator=torch.Generator().manual_seed(seed)) * 4


def reference_rows(processors, prompt, output, proposed, logits):
    """Scores of every row of a block, each from a call of its own with the ids before it."""
    rows = [
        processors(torch.tensor([[*prompt, *output, *proposed[:row]]]), logits[None, row])
        for row in range(len(proposed) + 1)
    ]
    return torch.cat(rows)


def assert_same(scores, expected):
    """Equal up to rounding, and minus infinity in the same places."""
    assert torch.equal(scores.isinf(), expected.isinf())
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(given_params=penalties(VOCABULARY), **histories)
def test_every_row_has_its_own_history(given_params, prompt, output, proposed, suppressed, seed):
    """Bias, penalties and minimum length at each row of a block are those of transformers, called row by row."""
    params = SamplingParams(**given_params)
    logits = random_logits(len(proposed) + 1, seed)
    history = TokenHistory(params, prompt, suppressed, VOCABULARY, CPU)
    history.extend(output)
    scores = history.apply(logits, *block_of(prompt, output, proposed))
    processors = reference_penalties(params, len(prompt), suppressed)
    assert_same(scores, reference_rows(processors, prompt, output, proposed, logits))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(given_params=penalties(VOCABULARY), cuts=truncations(), **histories)
def test_truncation_comes_behind_the_penalties(given_params, cuts, prompt, output, proposed, suppressed, seed):
    """The whole chain, temperature, top-k, top-p and min-p behind the penalties, is that of `generate` at each row."""
    params = SamplingParams(**given_params, **cuts)
    logits = random_logits(len(proposed) + 1, seed)
    history = TokenHistory(params, prompt, suppressed, VOCABULARY, CPU)
    history.extend(output)
    scores = history.apply(logits, *block_of(prompt, output, proposed))
    scores = process(scores[None], SamplingBatch.of([params], CPU))[0]
    processors = reference_penalties(params, len(prompt), suppressed)
    expected = reference_rows(processors, prompt, output, proposed, logits)
    assert_same(scores, expected if params.greedy else warped(expected, params))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(given_params=penalties(VOCABULARY), **histories)
def test_a_proposal_counts_like_a_committed_token(given_params, prompt, output, proposed, suppressed, seed):
    """A row behind some proposals has the very bits of the row that follows once they are committed, in however many
    pieces the history grew."""
    params = SamplingParams(**given_params)
    logits = random_logits(len(proposed) + 1, seed)
    history = TokenHistory(params, prompt, suppressed, VOCABULARY, CPU)
    history.extend(output)
    in_block = history.apply(logits, *block_of(prompt, output, proposed))
    for row in range(len(proposed) + 1):
        alone = history.apply(logits[None, row], *block_of(prompt, [*output, *proposed[:row]], []))
        assert torch.equal(alone[0], in_block[row])
        assert history.length == len(prompt) + len(output) + row
        history.extend(proposed[row : row + 1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.tuples(penalties(VOCABULARY), truncations(), histories["prompt"]), min_size=1, max_size=4),
    block=st.lists(st.tuples(ids, ids, ids), min_size=4, max_size=4),
    seed=histories["seed"],
)
def test_sessions_of_a_batch_do_not_see_each_other(batch, block, seed):
    """In a batch each session gets the bits that it gets alone, with a history or without one, sampled or greedy."""
    rows = [SamplingParams(**given_params, **cuts) for given_params, cuts, _ in batch]
    logits = random_logits(len(batch) * 4, seed).view(len(batch), 4, VOCABULARY)
    proposed = torch.tensor(block[: len(batch)])
    positions = torch.arange(4).expand(len(batch), 4) + 9
    several = [
        TokenHistory(params, prompt, {3, 5}, VOCABULARY, CPU) if params.needs_history else None
        for params, (_, _, prompt) in zip(rows, batch, strict=True)
    ]
    together = process(apply_histories(logits, proposed, positions, several), SamplingBatch.of(rows, CPU))
    for index, params in enumerate(rows):
        own = slice(index, index + 1)
        alone = apply_histories(logits[own], proposed[own], positions[own], several[own])
        assert torch.equal(together[index], process(alone, SamplingBatch.of([params], CPU))[0])


def test_options_that_change_nothing_need_no_history():
    """The defaults need no history, and a batch without any comes back untouched."""
    assert not SamplingParams().needs_history
    logits = torch.randn(2, 3, VOCABULARY)
    assert apply_histories(logits, torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3), [None, None]) is logits


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4])
def test_minimum_length_counts_the_output_alone(length):
    """An id that ends the turn can be chosen once `min_new_tokens` tokens of output stand before it, not earlier."""
    history = TokenHistory(SamplingParams(min_new_tokens=3), [1, 2], {7}, VOCABULARY, CPU)
    history.extend([4] * length)
    scores = history.apply(torch.zeros((1, VOCABULARY)), *block_of([1, 2], [4] * length, []))
    assert bool(scores[0, 7].isinf()) == (length < 3)
    assert scores[0].isfinite().sum() == VOCABULARY - (length < 3)
