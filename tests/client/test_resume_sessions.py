"""Laws of a session of several turns whose target is lost, in a turn or between two, with in-memory services."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from specpair import (
    Corpus,
    InvalidRequestError,
    ProtocolError,
    UnavailableError,
)

from .. import virtual_time
from .fakes import FakeDraft, FakeTarget, FakeTime, tokenized
from .losing import COUNT, GONE, MODES, PARAMS, PROMPT, check, client, turns


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "prompts",
    [
        [(1, 2), (3,), (4, 5)],
        ["one", " two", " three"],
        [[{"role": "user", "content": content}] for content in "abc"],
        [[{"role": "user", "content": "a"}], " two", (4, 5)],
    ],
    ids=["ids", "text", "chat", "mixed"],
)
class TestSessions:
    """A session of several turns, whose stream breaks."""

    def test_in_any_turn(self, mode, prompts):
        """At every message: all turns, the later ones included, are those of the undisturbed session."""
        target = FakeTarget()
        undisturbed = turns(prompts, target, mode=mode, draft_length=2)
        for message in range(1, target.messages):
            broken, draft = FakeTarget(breaks={message: GONE}), FakeDraft()
            results = turns(prompts, broken, draft, mode=mode, draft_length=2)
            assert sum(result.stats.resumes for result in results) == 1
            for result, expected in zip(results, undisturbed, strict=True):
                check(result, expected, result.stats.resumes)
            assert len(broken.streams) == 2
            assert len(draft.streams) == (mode == "draft:1")

    def test_between_two_turns(self, mode, prompts):
        """The next turn begins on a new stream, with all that was said."""
        undisturbed = turns(prompts, FakeTarget(), mode=mode)

        def lose(target):
            target.streams[-1].broken = GONE

        target = FakeTarget()
        results = turns(prompts, target, mode=mode, between=lose)
        for result, expected in zip(results, undisturbed, strict=True):
            check(result, expected, result.stats.resumes)
        assert [result.stats.resumes for result in results] == [0, 1, 1]
        assert [result.stats.cached_tokens for result in results] == [0, 0, 0]
        for start, result in zip(target.starts[1:], results[1:], strict=True):
            assert start.committed_token_ids == ()
            assert tuple(tokenized(start.prompt)) == result.prompt_token_ids


def test_a_conversation_that_renders_otherwise_goes_on_by_its_tokens():
    """As where a template writes the date: the turn keeps its tokens, and the next one begins with the whole."""

    class Dated(FakeTarget):
        def _open(self, start):
            target, started = super()._open(start)
            if self.starts[1:] and target.messages and start.committed_token_ids:
                started = replace(started, prompt_token_ids=(9, *started.prompt_token_ids[1:]))
            return target, started

    messages = [[{"role": "user", "content": content}] for content in "abc"]
    undisturbed = turns(messages, FakeTarget(), mode="none")
    target = Dated(breaks={17: GONE})
    results = turns(messages, target, mode="none")
    for result, expected in zip(results, undisturbed, strict=True):
        check(result, expected, result.stats.resumes)
    assert [result.stats.resumes for result in results] == [0, 1, 0]
    kinds = [(start.prompt[0].__class__, bool(start.committed_token_ids)) for start in target.starts]
    assert kinds == [(dict, False), (dict, True), (int, True), (dict, False)]
    assert len(target.starts[-1].prompt) == 5
    assert all(stream.cancelled for stream in target.streams)


def test_messages_behind_what_is_no_conversation_are_refused_also_after_a_loss():
    """The error is the target's own."""

    def lose(target):
        target.streams[-1].broken = GONE

    with pytest.raises(InvalidRequestError, match="does not hold a conversation"):
        turns(["a", [{"role": "user", "content": "b"}]], FakeTarget(), between=lose)


def test_a_session_that_is_closed_while_its_target_is_away_does_not_come_back():
    """Closing ends the waiting turn with an error, and no stream is opened any more."""
    target = FakeTarget(breaks={3: UnavailableError("later", retry_after=0.05)})

    async def run():
        async with client(target, mode="none", time=FakeTime(real=True)) as opened:
            session = opened.session()
            waiting = asyncio.create_task(session.generate(PROMPT, PARAMS))
            await asyncio.sleep(0.02)
            await session.aclose()
            with pytest.raises(UnavailableError, match="the session has ended") as ended:
                await waiting
            assert ended.value.reason == "SESSION_ENDED"
        assert len(target.streams) == 1

    virtual_time.run(run())


def test_nothing_is_opened_again_without_a_loss():
    """An undisturbed session extends its stream."""
    target, seen = FakeTarget(), []
    target.falsify_started = lambda started: seen.append(started) or started
    turns(["a", "b", "c"], target)
    assert (len(target.streams), len(seen)) == (1, 2)


def test_a_target_that_begins_a_resumed_session_with_other_tokens_is_not_believed():
    """What was said before a turn is not for the target to change."""

    class Inventive(FakeTarget):
        def _open(self, start):
            target, started = super()._open(start)
            first = started.prompt_token_ids[0] if len(self.starts) == 1 else 9
            return target, replace(started, prompt_token_ids=(first, *started.prompt_token_ids[1:]))

    def lose(target):
        target.streams[-1].broken = GONE

    with pytest.raises(ProtocolError, match="other tokens than it was given"):
        turns(["a", "b"], Inventive(), between=lose)


@pytest.mark.parametrize("breaks", [{}, {3: GONE}])
def test_closed_while_a_stream_opens(breaks):
    """A session that is closed meanwhile takes the stream with it, the first one and one to resume on."""

    class Slow(FakeTarget):
        async def verify(self, start, within=None):
            if bool(start.committed_token_ids) == bool(self.breaks):
                self.opening.set()
                await self.go_on.wait()
            return await super().verify(start, within)

    async def run():
        target = Slow(breaks=breaks)
        target.opening, target.go_on = asyncio.Event(), asyncio.Event()
        async with client(target) as opened:
            session = opened.session()
            turn = asyncio.create_task(session.generate(PROMPT, PARAMS))
            await target.opening.wait()
            await session.aclose()
            target.go_on.set()
            with pytest.raises(UnavailableError) as ended:
                await turn
            assert ended.value.reason == "SESSION_ENDED"
        assert all(stream.cancelled for stream in target.streams)

    virtual_time.run(run())


def test_a_finished_turn_is_learned_from_where_the_reader_stops():
    """Also by who takes the last chunk and does not ask for the end."""
    corpus = Corpus()

    async def run():
        async with client(FakeTarget(), corpus=corpus) as opened, opened.stream(PROMPT, PARAMS) as stream:
            async for chunk in stream:
                if chunk.finish_reason is not None:
                    break

    virtual_time.run(run())
    assert len(corpus) >= COUNT
