"""Laws of the client without asyncio."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from specpair import DeadlineError, SamplingParams, SyncSpeculativeClient, UnavailableError

from .fakes import FakeDraft, FakeTarget, continuation

PROMPT = (3, 4, 5)
PARAMS = SamplingParams(max_new_tokens=20)


def client(target=None, draft=None):
    return SyncSpeculativeClient(
        "target:1", "draft:1", target_transport=target or FakeTarget(), draft_transport=draft or FakeDraft()
    )


def test_the_result_is_the_async_one():
    """The same tokens, whole and in pieces."""
    with client() as opened:
        result = opened.generate(PROMPT, PARAMS)
        with opened.stream(PROMPT, PARAMS) as stream:
            chunks = list(stream)
        assert list(result.token_ids) == continuation(PROMPT, 20)
        assert stream.result.token_ids == result.token_ids
        assert stream.result.tokens == stream.tokens == tuple(token for chunk in chunks for token in chunk.tokens)
        assert "".join(chunk.text for chunk in chunks) == result.text
        assert stream.stats.output_tokens == 20
        assert [info.model for info in opened.info()] == ["target", "draft"]
        assert opened.healthy() == (True, True)
        assert opened.tokenize("a") == (97 % 50,)
        assert opened.detokenize([1]) == "<1>"


def test_a_session_is_the_async_one():
    """Turns on one stream, whole and in pieces; leaving the block ends it."""
    target, draft = FakeTarget(), FakeDraft()
    with client(target, draft) as opened:
        with opened.session() as session:
            first = session.generate(PROMPT, PARAMS)
            with session.stream((7,), PARAMS) as stream:
                chunks = list(stream)
            assert stream.result.tokens == tuple(token for chunk in chunks for token in chunk.tokens)
            assert list(stream.result.token_ids) == continuation((*PROMPT, *first.token_ids, 7), 20)
            assert stream.stats.cached_tokens == len(PROMPT) + 19
            assert session.token_ids == stream.result.prompt_token_ids + stream.result.token_ids
        assert [call.finished for call in target.streams + draft.streams] == [True, True]
        with pytest.raises(UnavailableError, match="it was closed"):
            session.generate((7,), PARAMS)
        with opened.session() as session:
            stream = session.stream(PROMPT, PARAMS)
            next(stream)
            stream.close()
            with pytest.raises(UnavailableError, match="a turn was left before its end"):
                session.generate((7,), PARAMS)
        session = opened.session()
    session.close()


def test_explanations_are_the_async_ones():
    """One position for each proposed id, and one behind them."""
    with client() as opened:
        explained = opened.explain(PROMPT, continuation(PROMPT, 2))
        assert [one.accepted for one in explained] == [True, True, False]


def test_leaving_a_stream_ends_its_calls():
    """Reading the first chunk only ends both calls when the block is left."""
    target, draft = FakeTarget(), FakeDraft()
    with client(target, draft) as opened, opened.stream(PROMPT, PARAMS) as stream:
        next(stream)
        stream.close()
        assert all(call.cancelled for call in target.streams + draft.streams)
        assert list(stream) == []


def test_errors_pass_through():
    """An exception in the thread is the caller's."""
    with client(FakeTarget(delay=3600)) as opened, pytest.raises(DeadlineError):
        opened.generate(PROMPT, PARAMS, timeout=0.05)


def test_several_threads_share_a_client():
    """Generations of several threads run side by side."""
    prompts = [(i, i + 1) for i in range(1, 9)]
    with (
        SyncSpeculativeClient("target:1", "ngram", target_transport=FakeTarget()) as opened,
        ThreadPoolExecutor(4) as threads,
    ):
        results = list(threads.map(lambda prompt: opened.generate(prompt, PARAMS), prompts))
    assert [list(result.token_ids) for result in results] == [continuation(prompt, 20) for prompt in prompts]


def test_closing_ends_the_thread():
    """After closing nothing runs, closing again does nothing, and using it is an error."""
    before = threading.active_count()
    opened = client()
    assert threading.active_count() == before + 1
    opened.close()
    opened.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        opened.generate(PROMPT, PARAMS)
