"""Processors at every position of a block: what transformers' own do with that position's own tokens."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specpair_runtime.sampling.history import TokenHistory, apply_histories
from specpair_runtime.sampling.params import SamplingBatch, SamplingParams
from specpair_runtime.sampling.processors import process

VOCABULARY = 24
CPU = torch.device("cpu")

ids = st.integers(0, VOCABULARY - 1)
penalized = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 0.5, 1.3, 4.0]),
        "presence_penalty": st.sampled_from([0.0, -2.0, 0.6, 2.0]),
        "frequency_penalty": st.sampled_from([0.0, -1.5, 0.3, 2.0]),
        "logit_bias": st.dictionaries(ids, st.sampled_from([-1000.0, -3.5, 0.25, 7.0]), max_size=4),
        "min_new_tokens": st.integers(0, 12),
    }
)
truncated = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 5, 100]),
        "top_p": st.sampled_from([1.0, 0.9, 0.4, 0.01]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    }
)


def params_of(penalties, truncation=None):
    bias = tuple(sorted(penalties["logit_bias"].items()))
    return SamplingParams(**{**penalties, "logit_bias": bias, **(truncation or {})})


class PresenceAndFrequency:
    """The definition, token by token: each penalty counts the output, not the prompt."""

    def __init__(self, prompt_length, presence, frequency):
        self.prompt_length, self.presence, self.frequency = prompt_length, presence, frequency

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for token_id, count in Counter(input_ids[0, self.prompt_length :].tolist()).items():
            scores[0, token_id] -= self.frequency * count + self.presence * (count > 0)
        return scores


def reference_processors(params, prompt_length, suppressed):
    """transformers' processors as `generate` builds them, in its order, before it scales and truncates."""
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token_id,): bias for token_id, bias in params.logit_bias}))
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(PresenceAndFrequency(prompt_length, params.presence_penalty, params.frequency_penalty))
    if suppressed and params.min_new_tokens > 0:
        processors.append(MinNewTokensLengthLogitsProcessor(prompt_length, params.min_new_tokens, sorted(suppressed)))
    return processors


def reference_warpers(params):
    """What `generate` appends when it samples."""
    warpers = LogitsProcessorList()
    if params.temperature > 0:
        warpers.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            warpers.append(TopPLogitsWarper(params.top_p))
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers


def reference_scores(processors, prompt, output, proposed, logits):
    """Scores of every row of a block, each from a call of its own with the ids before it."""
    rows = [
        processors(torch.tensor([[*prompt, *output, *proposed[:row]]]), logits[None, row])
        for row in range(len(proposed) + 1)
    ]
    return torch.cat(rows)


def block_of(prompt, output, proposed):
    """The proposals and the positions of the tokens that a block's rows choose."""
    first = len(prompt) + len(output)
    return torch.tensor(proposed, dtype=torch.int64), torch.arange(first, first + len(proposed) + 1)


def assert_same(scores, expected):
    """Equal up to rounding, and minus infinity in the same places."""
    assert torch.equal(scores.isinf(), expected.isinf())
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)


histories = {
    "prompt": st.lists(ids, min_size=1, max_size=8),
    "output": st.lists(ids, max_size=12),
    "proposed": st.lists(ids, max_size=7),
    "suppressed": st.frozensets(ids, max_size=3),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(penalties=penalized, **histories)
def test_every_row_has_its_own_history(penalties, prompt, output, proposed, suppressed, seed):
    """Bias, penalties and minimum length at each row of a block are those of transformers, called row by row."""
    params = params_of(penalties)
    logits = torch.randn((len(proposed) + 1, VOCABULARY), generator=torch.Generator().manual_seed(seed)) * 4
    history = TokenHistory(params, prompt, suppressed, VOCABULARY, CPU)
    history.extend(output)
    scores = history.apply(logits, *block_of(prompt, output, proposed))
    processors = reference_processors(params, len(prompt), suppressed)
    assert_same(scores, reference_scores(processors, prompt, output, proposed, logits))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(penalties=penalized, truncation=truncated, **histories)
def test_truncation_comes_after_the_penalties(penalties, truncation, prompt, output, proposed, suppressed, seed):
    """The whole chain, temperature, top-k, top-p and min-p behind the penalties, equals that of `generate` at each
    row."""
    params = params_of(penalties, truncation)
    logits = torch.randn((len(proposed) + 1, VOCABULARY), generator=torch.Generator().manual_seed(seed)) * 4
    history = TokenHistory(params, prompt, suppressed, VOCABULARY, CPU)
    history.extend(output)
    scores = history.apply(logits, *block_of(prompt, output, proposed))
    scores = process(scores[None], SamplingBatch.of([params], CPU))[0]
    processors = reference_processors(params, len(prompt), suppressed)
    processors += reference_warpers(params)
    assert_same(scores, reference_scores(processors, prompt, output, proposed, logits))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(penalties=penalized, **histories)
def test_a_proposal_counts_like_a_committed_token(penalties, prompt, output, proposed, suppressed, seed):
    """A row behind some proposals has the very bits of the row that follows once they are committed, in however many
    pieces the history grew."""
    params = params_of(penalties)
    logits = torch.randn((len(proposed) + 1, VOCABULARY), generator=torch.Generator().manual_seed(seed)) * 4
    history = TokenHistory(params, prompt, suppressed, VOCABULARY, CPU)
    history.extend(output)
    in_block = history.apply(logits, *block_of(prompt, output, proposed))
    for row in range(len(proposed) + 1):
        alone = history.apply(logits[None, row], *block_of(prompt, [*output, *proposed[:row]], []))
        assert torch.equal(alone[0], in_block[row])
        assert history.length == len(prompt) + len(output) + row
        history.extend(proposed[row : row + 1])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.tuples(penalized, truncated, st.lists(ids, max_size=5)), min_size=1, max_size=4), data=st.data()
)
def test_sessions_of_a_batch_do_not_see_each_other(batch, data):
    """In a batch each session gets the bits that it gets alone, with a history or without one, sampled or greedy."""
    width = 4
    rows = [params_of(penalties, truncation) for penalties, truncation, _ in batch]
    logits = torch.randn((len(batch), width, VOCABULARY), generator=torch.Generator().manual_seed(len(batch)))
    proposed = torch.tensor(
        data.draw(st.lists(st.lists(ids, min_size=3, max_size=3), min_size=len(batch), max_size=len(batch)))
    )
    positions = torch.arange(width).expand(len(batch), width) + 9
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


@pytest.mark.parametrize("length", [0, 1, 3, 4])
def test_minimum_length_counts_the_output_alone(length):
    """An id that ends the turn can be chosen once `min_new_tokens` tokens of output stand before it, not earlier."""
    history = TokenHistory(SamplingParams(min_new_tokens=3), [1, 2], {7}, VOCABULARY, CPU)
    history.extend([4] * length)
    scores = history.apply(torch.zeros((1, VOCABULARY)), *block_of([1, 2], [4] * length, []))
    assert bool(scores[0, 7].isinf()) == (length < 3)
    assert scores[0].isfinite().sum() == VOCABULARY - (length < 3)
