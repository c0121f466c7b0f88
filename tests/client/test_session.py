"""Laws of a session of several turns, from the caller's side, with in-memory services."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specpair import (
    DeadlineError,
    DraftMismatchError,
    FinishReason,
    InvalidRequestError,
    Phase,
    ProtocolError,
    SamplingParams,
    SpeculativeClient,
    UnavailableError,
)
from specpair.messages import Committed, Extend, Verdict

from .. import virtual_time
from . import fakes
from .fakes import FINGERPRINT, FakeDraft, FakeTarget, continuation, text_of, tokenized

COUNT = 12
PARAMS = SamplingParams(max_new_tokens=COUNT)
MODES = ["draft:1", "auto:draft:1", "ngram", "none"]
BEHAVIOURS = [
    fakes.perfect,
    fakes.liar,
    fakes.wrong_round,
    fakes.wrong_base,
    fakes.starting_again,
    fakes.hanging,
    fakes.dying,
]


def client(target=None, draft=None, mode="draft:1", **options):
    options.setdefault("draft_timeout", 0.05)
    return SpeculativeClient(
        "target:1", mode, target_transport=target or FakeTarget(), draft_transport=draft or FakeDraft(), **options
    )


def turns(prompts, *args, params=PARAMS, **options):
    """The results of a session with these prompts."""

    async def run():
        async with client(*args, **options) as opened, opened.session() as session:
            return [await session.generate(prompt, params) for prompt in prompts]

    return virtual_time.run(run())


def name(value):
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=name)
@pytest.mark.parametrize("draft_length", [None, 0, 3, 50])
def test_a_turn_is_a_fresh_session_given_everything(behaviour, draft_length):
    """Whatever the draft does and whatever the turns' prompts are made of, each turn continues all that was said."""
    params = SamplingParams(max_new_tokens=COUNT, seed=7)
    prompts = ["hello", (1, 2), " and then", [5]]
    results = turns(prompts, None, FakeDraft(behaviour), params=params, draft_length=draft_length)
    log = []
    for prompt, result in zip(prompts, results, strict=True):
        log += tokenized(prompt)
        assert list(result.prompt_token_ids) == log
        assert list(result.token_ids) == continuation(log, COUNT, 7)
        assert result.text == "".join(map(text_of, result.token_ids))
        assert result.finish_reason is FinishReason.MAX_NEW_TOKENS
        log += result.token_ids


@given(
    prompts=st.lists(st.lists(st.integers(1, 49), min_size=1, max_size=9), min_size=1, max_size=5),
    mode=st.sampled_from(MODES),
    behaviour=st.sampled_from([fakes.perfect, fakes.liar, fakes.dying]),
    count=st.integers(1, 20),
)
@settings(deadline=None)
def test_statistics_are_those_of_the_turn(prompts, mode, behaviour, count):
    """Counts start anew with every turn; what stays in the cache is all but the last token of what was there."""
    results = turns(prompts, None, FakeDraft(behaviour), mode=mode, params=SamplingParams(max_new_tokens=count))
    length = 0
    for prompt, result in zip(prompts, results, strict=True):
        stats = result.stats
        assert stats.cached_tokens == max(length - 1, 0)
        length += len(prompt)
        assert stats.prompt_tokens == len(result.prompt_token_ids) == length
        assert stats.output_tokens == len(result.tokens) == count
        assert stats.rounds == count - stats.accepted
        assert sum(stats.accepted_by_source.values()) == stats.accepted <= stats.proposed
        assert all(1 <= change.round <= stats.rounds for change in stats.proposer_changes)
        length += count


@pytest.mark.parametrize("mode", MODES)
def test_a_conversation_continues_with_its_new_messages(mode):
    """Only what is new is given; the turn is that of a fresh session given the whole, the answers included."""
    first, second, third = ({"role": "user", "content": content} for content in "abc")
    target, draft = FakeTarget(), FakeDraft()
    results = turns([[first], [second], [third]], target, draft, mode=mode)
    whole = []
    for message, result in zip((first, second, third), results, strict=True):
        whole.append(message)
        [fresh] = turns([whole], mode=mode)
        assert (result.token_ids, result.text) == (fresh.token_ids, fresh.text)
        assert result.prompt_token_ids == fresh.prompt_token_ids == tuple(tokenized(whole))
        whole.append({"role": "assistant", "content": result.text})
    assert all(0 < result.stats.cached_tokens < result.stats.prompt_tokens for result in results[1:])
    assert len(target.streams) == 1
    for start, result in zip(draft.starts, results, strict=False):
        assert start.token_ids == result.prompt_token_ids


@pytest.mark.parametrize("mode", MODES)
def test_all_turns_share_one_stream_at_each_service(mode):
    """One slot here and there: the draft hears of a turn with the whole session's tokens, and asks go on from there."""
    target, draft = FakeTarget(), FakeDraft()
    results = turns(["a", "b", "c"], target, draft, mode=mode, lookup="ngram" in mode)
    assert len(target.streams) == 1
    if "draft" in mode:
        assert len(draft.streams) == 1
        assert [start.token_ids for start in draft.starts] == [result.prompt_token_ids for result in results]
        assert {start.session_id for start in draft.starts} == {"s1"}
    else:
        assert draft.streams == []
    rounds = [block.round for block in target.blocks]
    assert len(set(rounds)) == len(rounds)


def test_without_a_draft_blocks_are_empty():
    """A session without a proposer decodes token by token on its own stream; the draft is not asked for anything."""
    target = FakeTarget()
    results = turns(["a", "b"], target, mode="none")
    assert {block.token_ids for block in target.blocks} == {()}
    assert target.infos == 1
    assert [result.stats.proposer for result in results] == ["none", "none"]
    assert [result.stats.rounds for result in results] == [COUNT, COUNT]


def test_every_turn_has_parameters_of_its_own():
    """Seed and limits are those of the turn, at the target and at the draft."""
    draft = FakeDraft()

    async def run():
        async with client(None, draft) as opened, opened.session() as session:
            first = await session.generate((3, 4), SamplingParams(max_new_tokens=5, seed=1))
            return first, await session.generate((5,), SamplingParams(max_new_tokens=9, seed=2))

    first, second = virtual_time.run(run())
    assert list(first.token_ids) == continuation((3, 4), 5, 1)
    assert list(second.token_ids) == continuation(second.prompt_token_ids, 9, 2)
    assert [start.params.seed for start in draft.starts] == [1, 2]
    assert second.stats.acceptance_rate == 1.0


def test_streams_of_earlier_turns_keep_their_results():
    """What a turn brought does not change with the next one; the session has all tokens."""

    async def run():
        async with client() as opened, opened.session() as session:
            assert session.token_ids == ()
            streams = [session.stream("a", PARAMS), session.stream("b", PARAMS)]
            found = []
            for stream in streams:
                chunks = [chunk async for chunk in stream]
                assert stream.tokens == tuple(token for chunk in chunks for token in chunk.tokens)
                found.append(stream.result)
            assert [stream.result.token_ids for stream in streams] == [result.token_ids for result in found]
            assert session.token_ids == found[1].prompt_token_ids + found[1].token_ids
            assert found[1].prompt_token_ids[: 1 + COUNT] == found[0].prompt_token_ids + found[0].token_ids

    virtual_time.run(run())


def test_a_session_ends_politely():
    """When its block is left both streams are ended, not just dropped; before that they stay open."""

    async def run():
        target, draft = FakeTarget(), FakeDraft()
        async with client(target, draft) as opened:
            async with opened.session() as session:
                await session.generate("a", PARAMS)
                [ours], [theirs] = target.streams, draft.streams
                assert not any(stream.finished or stream.cancelled for stream in (ours, theirs))
            assert ours.finished
            assert theirs.finished
            assert ours.cancelled
            await session.aclose()
            with pytest.raises(UnavailableError, match="the session has ended: it was closed"):
                await session.generate("b", PARAMS)

    virtual_time.run(run())


def test_a_session_without_a_turn_opens_nothing():
    """Nothing is sent before the first iteration of the first turn."""

    async def run():
        target, draft = FakeTarget(), FakeDraft()
        async with client(target, draft) as opened, opened.session() as session:
            stream = session.stream("a", PARAMS)
            await stream.aclose()
        assert (target.streams, draft.streams, target.infos) == ([], [], 0)

    virtual_time.run(run())


def test_an_exception_inside_the_block_ends_the_streams_at_once():
    """Nobody waits for a farewell then."""

    async def run():
        target, draft = FakeTarget(), FakeDraft()

        async def fail():
            async with client(target, draft) as opened, opened.session() as session:
                await session.generate("a", PARAMS)
                raise KeyError

        with pytest.raises(KeyError):
            await fail()
        assert all(stream.cancelled and not stream.finished for stream in target.streams + draft.streams)

    virtual_time.run(run())


async def leave(session):
    async with session.stream("b", PARAMS) as stream:
        await anext(stream)


async def cancel(session):
    task = asyncio.create_task(session.generate("b", SamplingParams()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def run_out_of_time(session):
    with pytest.raises(DeadlineError):
        await session.generate("b", SamplingParams(), timeout=0.01)


async def be_refused(session):
    with pytest.raises(InvalidRequestError) as refused:
        await session.generate("", PARAMS)
    assert refused.value.field == "extend.prompt"


async def ask_for_the_impossible(session):
    with pytest.raises(InvalidRequestError) as refused:
        await session.generate("b", SamplingParams(top_k=-1))
    assert refused.value.field == "extend.sampling.top_k"


@pytest.mark.parametrize("mode", ["draft:1", "ngram", "none"])
@pytest.mark.parametrize("cut", [leave, cancel, run_out_of_time, be_refused], ids=name)
def test_a_turn_cut_short_ends_the_session(mode, cut):
    """Both streams end at once, no task is left, and whoever goes on is told why it does not work."""

    async def run():
        target, draft = FakeTarget(), FakeDraft()
        async with client(target, draft, mode) as opened, opened.session() as session:
            await session.generate("a", PARAMS)
            for stream in target.streams + draft.streams:
                stream.delay = 3600 if cut in (cancel, run_out_of_time) else 0
            await cut(session)
            assert all(stream.cancelled and not stream.finished for stream in target.streams + draft.streams)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            for _ in range(2):
                with pytest.raises(UnavailableError, match="the session has ended: a turn ") as refused:
                    await session.generate("c", PARAMS)
                assert refused.value.reason == "SESSION_ENDED"
        assert len(target.streams) == 1

    virtual_time.run(run())


def test_losing_the_target_ends_the_session():
    """The tokens so far survive it, where the client is told not to resume."""

    async def run():
        target = FakeTarget(fails_after=20)
        async with client(target, mode="none", resume_timeout=0) as opened, opened.session() as session:
            first = await session.generate("a", PARAMS)
            stream = session.stream("b", PARAMS)
            with pytest.raises(UnavailableError, match="the connection broke"):
                async for _ in stream:
                    pass
            with pytest.raises(UnavailableError, match="has ended: a turn failed: the connection broke"):
                await session.generate("c", PARAMS)
            return first, stream.tokens, session.token_ids

    first, tokens, token_ids = virtual_time.run(run())
    assert len(tokens) == 20 - COUNT
    assert token_ids == (*tokenized("a"), *first.token_ids, *tokenized("b"), *(token.id for token in tokens))


def test_one_turn_at_a_time():
    """A turn that begins too early is refused; the one under way does not notice."""

    async def run():
        async with client() as opened, opened.session() as session:
            stream = session.stream("a", PARAMS)
            await anext(stream)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="has not reached its end"):
                    await session.generate("b", PARAMS)
            async for _ in stream:
                pass
            assert list(stream.result.token_ids) == continuation(tokenized("a"), COUNT)
            await session.generate("b", PARAMS)

    virtual_time.run(run())


def test_a_turn_has_reached_its_end_with_its_last_chunk():
    """Whoever stops reading there may go on at once, also with the streams of earlier turns still open."""

    async def run():
        target = FakeTarget()
        async with client(target) as opened, opened.session() as session:
            async with session.stream("a", PARAMS) as closed:
                async for chunk in closed:
                    if chunk.finish_reason is not None:
                        break
            left = session.stream("b", PARAMS)
            async for chunk in left:
                if chunk.finish_reason is not None:
                    break
            result = await session.generate("c", PARAMS)
            assert list(result.token_ids) == continuation(result.prompt_token_ids, COUNT)
            await left.aclose()
            await session.generate("d", PARAMS)
        assert target.streams[0].finished

    virtual_time.run(run())


def test_a_stream_that_nobody_holds_any_more_ends_the_session():
    """Breaking out of a loop over a turn leaves it for good."""

    async def run():
        target, draft = FakeTarget(), FakeDraft()
        async with client(target, draft) as opened, opened.session() as session:
            async for _ in session.stream("a", PARAMS):
                break
            gc.collect()
            await asyncio.sleep(0.01)
            with pytest.raises(UnavailableError, match="a turn was left before its end"):
                await session.generate("b", PARAMS)
        assert all(stream.cancelled and not stream.finished for stream in target.streams + draft.streams)

    virtual_time.run(run())


async def turn_with_the_model(session):
    """Goes on with short turns until one of them has the model from its beginning to its end."""
    async with asyncio.timeout(2.0):
        while True:
            result = await session.generate("b", PARAMS)
            assert list(result.token_ids) == continuation(result.prompt_token_ids, COUNT)
            if result.stats.proposer == "model" and not result.stats.proposer_changes:
                return result
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("behaviour", BEHAVIOURS[2:], ids=name)
def test_a_draft_that_was_lost_is_used_again_when_it_is_back(behaviour):
    """Prompt lookup finishes the turn; within two seconds a new stream is opened with all tokens, and kept."""
    target, draft = FakeTarget(), FakeDraft(behaviour)

    async def run():
        async with client(target, draft, draft_length=2, chain=0) as opened, opened.session() as session:
            first = await session.generate("a", PARAMS)
            draft.behaviour = fakes.perfect
            return first, await turn_with_the_model(session)

    first, later = virtual_time.run(run())
    assert [(change.round, change.proposer) for change in first.stats.proposer_changes] == [(3, "ngram")]
    assert later.stats.acceptance_rate == 1.0
    assert len(draft.streams) == 2
    assert draft.streams[0].cancelled
    assert draft.streams[1].finished
    assert draft.starts[-1].token_ids == later.prompt_token_ids
    assert target.infos == 1


def test_a_change_of_proposer_is_counted_within_its_turn():
    """A draft that is lost in the second turn's first round is lost in round 1."""

    def behaviour(draft, ask):
        return fakes.perfect(draft, ask) if len(draft.starts) == 1 else UnavailableError("gone")

    first, second = turns(["a", "b"], None, FakeDraft(behaviour), draft_length=2, chain=0)
    assert first.stats.proposer_changes == ()
    assert [change.round for change in second.stats.proposer_changes] == [1]


def test_a_draft_that_comes_up_later_is_used():
    """A refusal holds until the service is there."""
    draft = FakeDraft(phase=Phase.LOADING)

    async def run():
        async with client(None, draft) as opened, opened.session() as session:
            before = await session.generate("a", PARAMS)
            draft.phase = Phase.READY
            return before, await turn_with_the_model(session)

    before, _ = virtual_time.run(run())
    assert before.stats.proposer == "ngram"


def test_a_draft_with_another_vocabulary_opens_no_session():
    """The pair is compared before a slot is taken."""
    target = FakeTarget()
    with pytest.raises(DraftMismatchError):
        turns(["a"], target, FakeDraft(fingerprint=replace(FINGERPRINT, vocabulary_size=51)))
    assert target.streams == []


@pytest.mark.parametrize(
    "lie",
    [
        lambda started: replace(started, length=started.length + 1),
        lambda started: replace(started, cached_tokens=started.length),
        lambda started: replace(started, prompt_token_ids=()),
        lambda started: Verdict(1, False, started.length, 0, Committed((1,), "", (0,))),
    ],
)
def test_a_target_that_contradicts_itself_between_turns_is_not_believed(lie):
    """A later turn must start where the session stands."""
    with pytest.raises(ProtocolError):
        turns(["a", "b"], FakeTarget(falsify_started=lie))


def test_the_echo_of_a_block_of_the_last_turn_is_passed_over():
    """A stale verdict, as a duplicated message causes, may arrive between two turns."""

    async def run():
        target = FakeTarget()
        async with client(target) as opened, opened.session() as session:
            await session.generate("a", PARAMS)
            stream = target.streams[0]
            stream.answers.append(stream.answer(target.blocks[-1]))
            return await session.generate("b", PARAMS)

    result = virtual_time.run(run())
    assert list(result.token_ids) == continuation(result.prompt_token_ids, COUNT)


def test_a_one_shot_call_is_a_session_of_one_turn():
    """The same tokens, the same blocks, the same messages to the draft."""
    seen = []
    for one_shot in (True, False):
        target, draft = FakeTarget(), FakeDraft()

        async def run(target=target, draft=draft, one_shot=one_shot):
            async with client(target, draft, draft_length=3) as opened:
                if one_shot:
                    return await opened.generate("a", PARAMS)
                async with opened.session() as session:
                    return await session.generate("a", PARAMS)

        result = virtual_time.run(run())
        assert not any(isinstance(message, Extend) for message in target.blocks)
        seen.append((result.tokens, target.blocks, draft.starts, draft.asks))
    assert seen[0] == seen[1]
