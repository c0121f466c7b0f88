"""Lookups beside a model, predictions and corpora against the real services: the output stays the target's."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from specpair import Corpus, SamplingParams, Source, SpeculativeClient, SyncSpeculativeClient

from .conftest import VOCABULARY
from .processes import run

TOKENS = 32
SAMPLING = {
    "greedy": SamplingParams(max_new_tokens=TOKENS, ignore_eos=True),
    "sampled": SamplingParams(max_new_tokens=TOKENS, ignore_eos=True, temperature=0.8, top_p=0.95, seed=5),
    "penalised": SamplingParams(
        max_new_tokens=TOKENS, ignore_eos=True, temperature=1.0, seed=6, repetition_penalty=1.2, logprobs=2
    ),
}
PROPOSERS = ["model", "ngram", "liar"]


@pytest.fixture(scope="module", params=SAMPLING.values(), ids=SAMPLING)
def params(request):
    return request.param


@pytest.fixture(scope="module")
def chosen(prompts):
    """A short prompt and a long one."""
    return [prompts[i] for i in (3, 15)]


@pytest.fixture(scope="module")
def alone(bf16_target, chosen, params):
    """What the target says by itself."""
    return run(outputs((bf16_target.address, "none"), chosen, params))


async def outputs(addresses, prompts, params, predictions=None, **options):
    """Results of one client, one after the other; `predictions` has one for each prompt."""
    async with SpeculativeClient(*addresses, **options) as client:
        return [
            await client.generate(prompt, params, prediction=predictions[i] if predictions else None)
            for i, prompt in enumerate(prompts)
        ]


def same(results, alone):
    """The same tokens, text, finish and log probabilities; every accepted token has a source."""
    for result, expected in zip(results, alone, strict=True):
        assert result.token_ids == expected.token_ids
        assert result.text == expected.text
        assert result.finish_reason is expected.finish_reason
        assert [token.logprobs for token in result.tokens] == [token.logprobs for token in expected.tokens]
        assert sum(result.stats.accepted_by_source.values()) == result.stats.accepted
    return True


def half_right(ids):
    """Some tokens replaced, some left out, some put in."""
    rng = random.Random(len(ids))
    changed = []
    for token in ids:
        match rng.randrange(16):
            case 0:
                changed.append(rng.randrange(VOCABULARY))
            case 1:
                pass
            case 2:
                changed += [token, rng.randrange(VOCABULARY)]
            case _:
                changed.append(token)
    return changed


@pytest.mark.parametrize("options", [{}, {"lookup": True, "draft_length": 3}, {"lookup": False}], ids=str)
@pytest.mark.parametrize("kind", PROPOSERS)
def test_combined(bf16, chosen, params, alone, kind, options):
    """Lookups beside a model, a liar or nothing, or switched off, change no token."""
    assert same(run(outputs(bf16(kind), chosen, params, **options)), alone)


@pytest.mark.parametrize("kind", PROPOSERS)
def test_predictions(bf16, chosen, params, alone, kind):
    """A prediction that is right, half right, wrong, or in ids that no vocabulary has changes no token."""
    truth = [result.token_ids for result in alone]
    right = run(outputs(bf16(kind), chosen, params, truth))
    assert same(right, alone)
    for result in right:
        assert result.stats.accepted_by_source.get(Source.PREDICTION, 0) > TOKENS / 2
    others = {
        "half": [half_right(ids) for ids in truth],
        "another's": [*truth[1:], truth[0]],
        "strange": [[2**32 - 1 - i if i % 3 else id_ for i, id_ in enumerate(ids)] for ids in truth],
        "empty": [() for _ in truth],
    }
    for predictions in others.values():
        assert same(run(outputs(bf16(kind), chosen, params, predictions)), alone)


def test_a_prediction_of_text(bf16, chosen, params, alone):
    """The output's text, tokenized by itself, is found to come true for the most part."""
    texts = [result.text for result in alone]
    results = run(outputs(bf16("ngram"), chosen, params, texts))
    assert same(results, alone)
    if params.temperature is None:  # sampled text need not be tokenized the way that it was generated
        proposed = sum(result.stats.accepted_by_source.get(Source.PREDICTION, 0) for result in results)
        assert proposed > len(results) * TOKENS / 3


@pytest.mark.parametrize("kind", PROPOSERS)
def test_corpora(bf16, chosen, params, alone, kind):
    """A corpus of rubbish, of ids that do not exist, or of the outputs themselves changes no token."""
    rng = random.Random(7)
    truth = [result.token_ids for result in alone]
    # Everything is found in it, and hardly anything comes true.
    pairs = [pair for ids in truth for pair in pairwise(ids)]
    rubbish = [[*pair, rng.randrange(VOCABULARY), rng.randrange(VOCABULARY)] for pair in pairs]
    strange = [[*pair, 2**32 - 1] for pair in pairs]
    for texts in (rubbish, strange, truth):
        corpus = Corpus(texts)
        before = len(corpus)
        results = run(outputs(bf16(kind), chosen, params, corpus=corpus))
        assert same(results, alone)
        assert len(corpus) > before
    # Beside another proposer it is a matter of measured times whether a lookup is preferred.
    if kind == "ngram":
        results = run(outputs(bf16(kind), chosen, params, corpus=Corpus(truth), draft_length=3))
        assert same(results, alone)
        assert sum(result.stats.accepted_by_source.get(Source.PREDICTION, 0) for result in results) > TOKENS / 2


def test_sessions_and_the_client_without_asyncio(bf16, chosen, params, alone):
    """Turns take predictions too, and so does the other client."""
    with SyncSpeculativeClient(*bf16("model"), corpus=Corpus()) as client, client.session() as session:
        first = session.generate(chosen[0], params, prediction=alone[0].token_ids)
        assert first.token_ids == alone[0].token_ids
        again = session.generate("\n", params, prediction=alone[0].text)
        assert len(again.tokens) == TOKENS
        assert client.generate(chosen[1], params, prediction=alone[1].text).token_ids == alone[1].token_ids
