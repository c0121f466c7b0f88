"""Laws of a generation whose target is lost under way, from the caller's side, with in-memory services."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specpair import (
    CancelledError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    ProtocolError,
    UnavailableError,
)
from specpair.transports import STREAM_ENDED

from .. import virtual_time
from . import fakes
from .fakes import FakeDraft, FakeTarget, FakeTime, continuation
from .losing import COUNT, GONE, MODES, PARAMS, PROMPT, check, client, generate


@pytest.mark.parametrize("seed", [0, 3, 8])
@pytest.mark.parametrize("chain", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_broken_at_every_message(mode, chain, seed):
    """Wherever the stream breaks, the output is that of the undisturbed run; the draft's session goes on."""
    params = replace(PARAMS, seed=seed)
    options = {"mode": mode, "chain": chain, "params": params, "draft_length": 2}
    target = FakeTarget()
    undisturbed = generate(target, **options)
    assert list(undisturbed.token_ids) == continuation(PROMPT, COUNT, seed)
    for message in range(1, target.messages):
        target, draft = FakeTarget(breaks={message: GONE}), FakeDraft()
        check(generate(target, draft, **options), undisturbed)
        first, second = target.starts
        assert first.prompt == second.prompt == PROMPT
        assert second.committed_token_ids == undisturbed.token_ids[: len(second.committed_token_ids)]
        assert target.streams[0].cancelled
        assert len(draft.streams) == (mode == "draft:1")


@pytest.mark.parametrize("mode", MODES)
def test_a_verdict_with_the_end_that_was_lost_is_computed_again(mode):
    """The last message is the one with the finish reason: the new stream says it again."""
    target, options = FakeTarget(), {"mode": mode, "draft_length": 2, "chain": 0}
    undisturbed = generate(target, **options)
    check(generate(FakeTarget(breaks={target.messages - 1: GONE}), **options), undisturbed)


@given(
    breaks=st.sets(st.integers(0, 40), max_size=12),
    mode=st.sampled_from(MODES),
    behaviour=st.sampled_from([fakes.perfect, fakes.liar, fakes.dying]),
    chain=st.sampled_from([0, 1, 3, None]),
    lookup=st.booleans(),
    seed=st.integers(0, 9),
    delay=st.sampled_from([0.0, 0.001]),
)
@settings(max_examples=150, deadline=None)
def test_however_often_it_breaks(breaks, mode, behaviour, chain, lookup, seed, delay):
    """Any number of breaks at any messages, with any draft: the same tokens, texts and prompt."""
    params = replace(PARAMS, seed=seed)
    target = FakeTarget(breaks=dict.fromkeys(breaks, GONE), delay=delay)
    draft = FakeDraft(behaviour)
    patient = {"connect_timeout": 60.0}  # all breaks may come before the beginning
    result = generate(target, draft, mode, params=params, chain=chain, lookup=lookup, **patient)
    undisturbed = generate(FakeTarget(), mode="none", params=params)
    check(result, undisturbed, resumes=result.stats.resumes)
    broken = len(target.streams) - 1
    assert result.stats.resumes <= broken == sum(message < target.messages for message in breaks)


@pytest.mark.parametrize(
    "lost",
    [
        UnavailableError("GOAWAY"),
        UnavailableError("draining", reason="DRAINING"),
        UnavailableError("later", retry_after=0.5),
        CancelledError("a proxy's word"),
        InternalError("nginx's word"),
        InternalError("Stream removed", reason="UNKNOWN"),
        OverloadedError("no slot", reason="KV_SLOTS_EXHAUSTED", retry_after=1.0),
        ProtocolError("the service ended the stream early", reason=STREAM_ENDED),
    ],
    ids=repr,
)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_resumed(lost, mode):
    """Every failure that only says that this target is not there now."""
    undisturbed = generate(FakeTarget(), mode=mode)
    check(generate(FakeTarget(breaks={3: lost}), mode=mode), undisturbed)


@pytest.mark.parametrize(
    "final",
    [
        InvalidRequestError("no", field="block.token_ids"),
        DeadlineError("too late"),
        InternalError("NaN logits", request_id="r-1"),
        InternalError("not for you", reason="PERMISSION_DENIED"),
        InternalError("who knows", reason="UNKNOWN", request_id="r-1"),
        OverloadedError("out of memory"),
        ProtocolError("two answers"),
        UnavailableError("let it be", retry_after=float("inf")),
        UnavailableError("the client is closed", reason="CLOSED"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_resumed(final, mode):
    """A failure that would come again reaches the caller at once, as it is, with the tokens so far."""
    target = FakeTarget(breaks={3: final})

    async def run():
        async with client(target, mode=mode, chain=0) as opened:
            stream = opened.stream(PROMPT, PARAMS)
            with pytest.raises(type(final)) as raised:
                async for _ in stream:
                    pass
            assert raised.value is final
            return [token.id for token in stream.tokens]

    ids = virtual_time.run(run())
    assert ids == continuation(PROMPT, len(ids)) != []
    assert len(target.streams) == 1


def test_a_target_that_contradicts_itself_is_not_resumed():
    """A verdict that cannot be true is no lost target."""
    target = FakeTarget(falsify=lambda verdict: replace(verdict, base_length=verdict.base_length + 1))
    with pytest.raises(ProtocolError):
        generate(target)
    assert len(target.streams) == 1


def test_a_target_that_resumes_elsewhere_is_not_believed():
    """A new stream has to stand where the log does."""

    class Forgetful(FakeTarget):
        def _open(self, start):
            return super()._open(replace(start, committed_token_ids=()))

    with pytest.raises(ProtocolError, match="goes on at length 3; here it is"):
        generate(Forgetful(breaks={3: GONE}))


@pytest.mark.parametrize("mode", MODES)
def test_a_caller_that_cancels_is_not_resumed(mode):
    """Neither in a turn nor while a target is waited for; nothing is left behind."""

    async def run(target, **options):
        task = asyncio.create_task(client(target, mode=mode, **options).generate(PROMPT, PARAMS))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(stream.cancelled for stream in target.streams)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    virtual_time.run(run(FakeTarget(delay=3600)))
    away = FakeTarget(breaks={3: UnavailableError("later", retry_after=5.0)})
    virtual_time.run(run(away, time=FakeTime(real=True)))
    assert len(away.streams) == 1


@pytest.mark.parametrize("mode", MODES)
def test_the_deadline_holds_while_a_target_is_away(mode):
    """The caller's time limit ends the waiting."""
    away = FakeTarget(breaks=dict.fromkeys(range(3, 400), GONE))

    async def run():
        async with client(away, mode=mode, time=FakeTime(real=True)) as opened:
            with pytest.raises(DeadlineError):
                await opened.generate(PROMPT, PARAMS, timeout=0.3)
        assert all(stream.cancelled for stream in away.streams)

    virtual_time.run(run())


def test_a_new_stream_is_told_what_is_left_of_the_time():
    """The time limit is that of the whole generation."""

    class Told(FakeTarget):
        async def verify(self, start, within=None):
            told.append(within)
            time.now += 1.0
            return await super().verify(start, within)

    told, time = [], FakeTime()
    generate(Told(breaks={2: GONE, 5: GONE}), mode="ngram", time=time, timeout=60.0)
    assert told == [60.0, 59.0, 58.0]


@pytest.mark.parametrize("limit", [0, 1.0, 10.0])
@pytest.mark.parametrize("mode", MODES)
def test_a_target_that_stays_away_is_an_error_in_the_end(mode, limit, caplog):
    """After `resume_timeout` seconds without a new token the last failure is raised; 0 does not resume at all."""
    away, time = FakeTarget(breaks=dict.fromkeys(range(3, 400), GONE)), FakeTime()
    with caplog.at_level(logging.WARNING, "specpair"), pytest.raises(UnavailableError, match="the connection broke"):
        generate(away, mode=mode, time=time, resume_timeout=limit)
    assert time.now <= limit
    assert time.now > limit - 2.4 or not limit
    assert len(away.streams) == (1 if limit == 0 else 1 + len(time.waits))
    assert [record.message for record in caplog.records] == (
        ["target lost: the connection broke; resuming"] if limit else []
    )


def test_a_target_that_takes_the_session_and_says_nothing_is_an_error_in_the_end():
    """A try to resume takes no longer than what is left of the time."""

    class Silent(FakeTarget):
        async def verify(self, start, within=None):
            stream = await super().verify(start, within)
            if start.committed_token_ids:
                stream.delay = 3600
            return stream

    target = Silent(breaks={3: GONE})
    with pytest.raises(UnavailableError, match="the connection broke"):
        generate(target, resume_timeout=0.05)
    assert target.streams[-1].cancelled


def test_tokens_are_progress():
    """A target that breaks again and again is gone on with as long as each stream brings tokens, without a wait."""
    time = FakeTime()
    target = FakeTarget(breaks=dict.fromkeys(range(2, 200, 3), GONE))
    result = generate(target, mode="none", time=time, resume_timeout=1.0)
    assert list(result.token_ids) == continuation(PROMPT, COUNT)
    assert result.stats.resumes == COUNT - 1
    assert set(time.waits) == {0.0}


def test_without_progress_there_is_a_wait():
    """A new stream that breaks before it brings a token is no progress, whatever it said: the next try waits longer."""
    time = FakeTime()
    target = FakeTarget(breaks=dict.fromkeys([3, 5, 7, 8, 10], GONE))
    result = generate(target, mode="none", time=time)
    assert list(result.token_ids) == continuation(PROMPT, COUNT)
    assert time.waits[0] == 0.0
    assert len(time.waits) == 5
    assert all(longer > shorter for shorter, longer in pairwise(time.waits))


def test_every_resume_is_in_the_log_without_the_text(caplog):
    """One warning for each, with the reason and neither prompt nor tokens."""
    with caplog.at_level(logging.DEBUG, "specpair"):
        result = generate(FakeTarget(breaks={3: GONE, 5: CancelledError("RST")}), prompt="a secret")
    assert result.stats.resumes == 2
    said = [(record.levelname, record.message) for record in caplog.records if record.name == "specpair"]
    assert said == [
        ("WARNING", "target lost: the connection broke; resuming"),
        ("WARNING", "target lost: RST; resuming"),
    ]
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert {record.request_id for record in warnings} == {result.request_id}
