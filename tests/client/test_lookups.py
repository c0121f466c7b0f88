"""Laws of lookups, predictions and corpora from the caller's side, with in-memory services."""

from __future__ import annotations

import random

import pytest

from specpair import (
    Corpus,
    DeadlineError,
    FinishReason,
    InvalidRequestError,
    SamplingParams,
    Source,
    SpeculativeClient,
    SyncSpeculativeClient,
    UnavailableError,
)

from .. import virtual_time
from . import fakes
from .fakes import VOCABULARY, FakeDraft, FakeTarget, continuation, text_of

PROMPT = (3, 4, 5)
COUNT = 60
PARAMS = SamplingParams(max_new_tokens=COUNT)
TRUTH = continuation(PROMPT, COUNT)
HALF = [token if i % 9 else 40 for i, token in enumerate(TRUTH)]
NOISE = random.Random(1).choices(range(VOCABULARY), k=COUNT)
# Ids that the target has not, and would refuse.
STRANGE = [token if i % 5 else 2**32 - 1 - i for i, token in enumerate(TRUTH)]


def client(target=None, draft=None, mode="draft:1", kind=SpeculativeClient, **options):
    options.setdefault("draft_timeout", 0.05)
    return kind(
        "target:1", mode, target_transport=target or FakeTarget(), draft_transport=draft or FakeDraft(), **options
    )


def generate(*args, prediction=None, params=PARAMS, **options):
    async def run():
        async with client(*args, **options) as opened:
            return await opened.generate(PROMPT, params, prediction=prediction)

    return virtual_time.run(run())


@pytest.mark.parametrize("mode", ["draft:1", "ngram", "none"])
@pytest.mark.parametrize("lookup", [None, True, False])
@pytest.mark.parametrize("prediction", [None, TRUTH, HALF, NOISE, STRANGE, [], "some text"], ids=lambda p: str(p)[:9])
@pytest.mark.parametrize("texts", [None, [], [TRUTH], [NOISE, HALF, STRANGE]], ids=lambda t: str(t)[:9])
@pytest.mark.parametrize("draft_length", [None, 3])
def test_the_output_is_the_target_s(mode, lookup, prediction, texts, draft_length):
    """Whoever proposes, and whatever is given beforehand, tokens and text are those of the target alone."""
    corpus = None if texts is None else Corpus(texts)
    options = {"lookup": lookup, "corpus": corpus, "draft_length": draft_length}
    result = generate(None, FakeDraft(fakes.liar), mode, prediction=prediction, **options)
    assert list(result.token_ids) == TRUTH
    assert "".join(token.text for token in result.tokens) == result.text
    assert result.finish_reason is FinishReason.MAX_NEW_TOKENS
    assert sum(result.stats.accepted_by_source.values()) == result.stats.accepted


@pytest.mark.parametrize("mode", ["draft:1", "ngram"])
def test_a_right_prediction_comes_in_whole_blocks(mode):
    """From the first round on, without a draft service being asked at all."""
    draft = FakeDraft()
    stats = generate(None, draft, mode, prediction=TRUTH).stats
    assert stats.rounds == -(-COUNT // 8)
    assert set(stats.accepted_by_source) == {Source.PREDICTION}
    assert draft.asks == []


def test_a_prediction_of_text_is_tokenized_by_the_target():
    """The text is the target's to tokenize, and what it cannot be is refused before a slot is taken."""
    target = FakeTarget()
    assert list(generate(target, mode="ngram", prediction="some text").token_ids) == TRUTH
    assert len(target.streams) == 1
    with pytest.raises(InvalidRequestError) as refused:
        generate(target, mode="ngram", prediction=[-1])
    assert refused.value.field == "prediction"
    assert len(target.streams) == 1


def test_a_model_and_lookups_take_turns():
    """With a draft service of middling quality both propose in one generation, unless lookups are off."""
    params = SamplingParams(max_new_tokens=200)
    sources = generate(None, FakeDraft(fakes.liar), params=params).stats.accepted_by_source
    assert set(sources) == {Source.MODEL, Source.NGRAM}
    alone = generate(None, FakeDraft(fakes.liar), lookup=False, params=params).stats.accepted_by_source
    assert set(alone) == {Source.MODEL}


@pytest.mark.parametrize(
    ("options", "params"), [({"draft_length": 2}, PARAMS), ({}, SamplingParams(max_new_tokens=60, rule="rejection"))]
)
def test_the_model_is_alone_where_the_choice_would_show(options, params):
    """A fixed draft length, and the rejection rule, whose draw depends on who proposes, leave lookups out by
    themselves; `lookup=True` puts them in."""
    assert set(generate(params=params, **options).stats.accepted_by_source) == {Source.MODEL}
    assert (
        Source.NGRAM
        in generate(None, FakeDraft(fakes.liar), params=params, lookup=True, **options).stats.accepted_by_source
    )


@pytest.mark.parametrize("behaviour", [fakes.wrong_round, fakes.hanging, fakes.dying])
def test_a_lost_draft_leaves_all_lookups(behaviour):
    """Text, prediction and corpus are looked up in when the draft service is lost, also if they were off beside it."""
    for lookup in (None, False):
        result = generate(None, FakeDraft(behaviour), lookup=lookup, prediction=[40, *TRUTH])
        assert list(result.token_ids) == TRUTH
        if result.stats.proposer_changes:
            assert result.stats.proposer == "ngram"
            assert {Source.PREDICTION, Source.NGRAM} & set(result.stats.accepted_by_source)


def test_a_corpus_takes_every_finished_output():
    """An output is there for the next generation of the client; without a corpus nothing is."""

    async def run(corpus):
        async with client(mode="ngram", corpus=corpus) as opened:
            return [(await opened.generate(PROMPT, PARAMS)).stats for _ in range(2)]

    corpus = Corpus()
    first, second = virtual_time.run(run(corpus))
    assert len(corpus) == 2 * COUNT + 1
    assert Source.PREDICTION not in first.accepted_by_source
    assert second.accepted_by_source[Source.PREDICTION] > 0
    assert second.rounds <= first.rounds
    assert all(Source.PREDICTION not in stats.accepted_by_source for stats in virtual_time.run(run(None)))


def test_an_unfinished_output_is_not_kept():
    """What was broken off is in no corpus."""

    async def run():
        corpus = Corpus()
        async with client(mode="ngram", corpus=corpus) as opened, opened.stream(PROMPT, PARAMS) as stream:
            await anext(stream)
        return corpus

    assert len(virtual_time.run(run())) == 0


def test_turns_of_a_session():
    """Each turn has its own prediction, and its output goes to the corpus when it has ended."""

    async def run():
        corpus = Corpus()
        async with client(corpus=corpus) as opened, opened.session() as session:
            first = await session.generate(PROMPT, PARAMS, prediction=TRUTH)
            after = continuation((*PROMPT, *TRUTH, 7), COUNT)
            assert len(corpus) == COUNT
            async with session.stream((7,), PARAMS, prediction=after) as stream:
                assert [token.id async for chunk in stream for token in chunk.tokens] == after
            return first, stream.result

    for result in virtual_time.run(run()):
        assert result.stats.rounds == -(-COUNT // 8)
        assert set(result.stats.accepted_by_source) == {Source.PREDICTION}


def test_the_client_without_asyncio():
    """Predictions and a corpus do the same there, in generations and sessions."""
    corpus = Corpus()
    with client(kind=SyncSpeculativeClient, corpus=corpus) as opened:
        result = opened.generate(PROMPT, PARAMS, prediction=TRUTH)
        with opened.stream(PROMPT, PARAMS, prediction="".join(map(text_of, TRUTH))) as stream:
            assert [token.id for chunk in stream for token in chunk.tokens] == TRUTH
        with opened.session() as session:
            again = session.generate(PROMPT, PARAMS, prediction=TRUTH)
            with session.stream((7,), PARAMS, prediction=TRUTH) as turn:
                assert len([token for chunk in turn for token in chunk.tokens]) == COUNT
    assert result.stats.rounds == again.stats.rounds == -(-COUNT // 8)
    assert len(corpus) >= 4 * COUNT


def test_a_target_that_does_not_answer_is_named():
    """What is given beforehand needs the target's vocabulary: a target that cannot say it is unavailable."""
    with pytest.raises(UnavailableError, match="did not answer"):
        generate(FakeTarget(failure=DeadlineError("late")), mode="ngram", prediction=TRUTH)
