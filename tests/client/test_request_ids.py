"""A generation has one id, whatever becomes of it, and one line in the client's log."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpair import DraftMismatchError, SamplingParams, SpeculativeClient, UnavailableError
from specpair.errors import InternalError
from specpair.request_ids import request_id_of

from .. import virtual_time
from .fakes import FINGERPRINT, VOCABULARY, FakeDraft, FakeTarget

PROMPT = [3, 4, 5]
PARAMS = SamplingParams(max_new_tokens=14)


def client(target=None, draft=None, **options):
    """A client of in-memory services."""
    options = {"draft_transport": draft, **options} if draft is not None else options
    name = "draft:1" if draft is not None else "ngram"
    return SpeculativeClient("target:1", name, target_transport=target or FakeTarget(), **options)


def run(work):
    """Runs a coroutine to its end; the bound stands for "does not hang"."""

    async def bounded():
        async with asyncio.timeout(30):
            return await work

    return virtual_time.run(bounded())


async def generate(given=None, target=None, **options):
    """One generation."""
    async with client(target, **options) as opened:
        return await opened.generate(PROMPT, PARAMS, request_id=given)


@pytest.fixture
def lines(caplog):
    """What the client has logged of generations."""
    caplog.set_level(logging.INFO, "specpair.generation")
    return lambda: [record for record in caplog.records if record.name == "specpair.generation"]


@given(st.text(max_size=200))
def test_an_id_is_safe_to_log(text):
    """Whatever is given, an id has 1 to 128 harmless characters; what has them already is kept."""
    found = request_id_of(text)
    assert re.fullmatch(r"[A-Za-z0-9._:/+=-]{1,128}", found)
    assert found == text or len(found) == 32


@pytest.mark.parametrize("value", [None, "", 7, b"bytes", "line\nbreak", "trailing\n", "é", "x" * 129])
def test_what_is_no_id(value):
    """Gets a fresh one, another every time."""
    assert request_id_of(value) != request_id_of(value)


def test_the_result_says_its_id():
    """It is the caller's, else a fresh one."""
    assert run(generate("mine-1")).request_id == "mine-1"
    assert run(generate()).request_id != run(generate()).request_id
    assert run(generate("two words")).request_id != "two words"


def test_a_stream_says_it_before_it_begins():
    """So that who streams can log it with whatever comes."""

    async def work():
        async with client() as opened, opened.stream(PROMPT, PARAMS, request_id="mine-2") as stream:
            assert stream.request_id == "mine-2"
            async for _ in stream:
                pass
            return stream.result.request_id

    assert run(work()) == "mine-2"


def test_a_session_has_one_id_for_its_turns():
    """The caller's, or a fresh one."""

    async def work(given):
        async with client() as opened, opened.session(request_id=given) as session:
            turns = [await session.generate(PROMPT, PARAMS) for _ in range(2)]
            return session.request_id, {turn.request_id for turn in turns}

    assert run(work("mine-3")) == ("mine-3", {"mine-3"})
    fresh, turns = run(work(None))
    assert turns == {fresh}


def test_failures_carry_it():
    """A service's own id of the failed call goes before the generation's, which goes before none."""
    lost = FakeTarget(breaks={2: UnavailableError("gone")})
    with pytest.raises(UnavailableError) as failed:
        run(generate("mine-4", lost, resume_timeout=0.0))
    assert failed.value.request_id == "mine-4"
    with pytest.raises(InternalError) as failed:
        run(generate("mine-4", FakeTarget(breaks={2: InternalError("it", request_id="theirs")})))
    assert failed.value.request_id == "theirs"


def test_a_shared_failure_says_each_its_own():
    """What fails several generations at once has the id of each."""

    async def work():
        draft = FakeDraft()
        draft.fingerprint = FINGERPRINT.__class__(VOCABULARY + 1, "aa", "bb", (0,))
        async with client(draft=draft) as opened:
            wanted = [f"mine-{number}" for number in range(3)]
            calls = (opened.generate(PROMPT, PARAMS, request_id=one) for one in wanted)
            failures = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(failure) for failure in failures} == {DraftMismatchError}
        assert [failure.request_id for failure in failures] == wanted

    run(work())


def test_one_line_at_the_end(lines):
    """Of a generation, with its counts; no prompt and no text."""
    result = run(generate("mine-5", FakeTarget(delay=0.001)))
    (line,) = lines()
    stats = result.stats
    assert line.levelname == "INFO"
    assert (line.request_id, line.status, line.finish) == ("mine-5", "OK", result.finish_reason.value)
    assert (line.output_tokens, line.rounds, line.accepted) == (stats.output_tokens, stats.rounds, stats.accepted)
    assert (line.proposer, line.resumes) == ("ngram", 0)
    assert line.seconds >= line.time_to_first_token > 0
    assert "mine-5" in line.getMessage()
    assert result.text not in str(vars(line))


def test_the_line_of_a_failure(lines):
    """Says its status and its reason, and not the message, which may quote the request."""
    broken = FakeTarget(breaks={2: UnavailableError("'secret' broke", reason="DRAINING")})
    with pytest.raises(UnavailableError):
        run(generate(target=broken, resume_timeout=0.0))
    (line,) = lines()
    assert (line.status, line.reason) == ("UNAVAILABLE", "DRAINING")
    assert "secret" not in str(vars(line))


def test_the_line_of_what_nobody_closed(lines):
    """A stream whose loop is left by `break` is one that was left, with or without a block around it."""

    async def work():
        async with client(FakeTarget(delay=0.01)) as opened:
            async for _ in opened.stream(PROMPT, SamplingParams(max_new_tokens=900)):
                break
            assert [line.status for line in lines()] == ["CANCELLED"]

    run(work())
    assert len(lines()) == 1


@pytest.mark.parametrize("how", ["left", "cancelled", "late"])
def test_the_line_of_what_was_left(lines, how):
    """One line, whichever way it ends."""

    async def work():
        async with client(FakeTarget(delay=0.01)) as opened:
            timeout = 0.05 if how == "late" else None
            async with opened.stream(PROMPT, SamplingParams(max_new_tokens=900), timeout=timeout) as stream:
                await anext(stream)
                if how == "cancelled":
                    asyncio.current_task().cancel()
                if how != "left":
                    async for _ in stream:
                        pass

    expected = {"left": (), "cancelled": asyncio.CancelledError, "late": Exception}[how]
    if expected:
        with pytest.raises(expected):
            run(work())
    else:
        run(work())
    (line,) = lines()
    assert line.status == ("DEADLINE_EXCEEDED" if how == "late" else "CANCELLED")


def test_a_close_in_the_wrong_task_is_no_end(lines):
    """It is refused; the generation goes on, and its line is that of its own end."""

    async def work():
        async with client(FakeTarget(delay=0.001)) as opened:
            stream = opened.stream(PROMPT, PARAMS)

            async def iterate():
                async for _ in stream:
                    pass

            iterating = asyncio.create_task(iterate())
            await asyncio.sleep(0.003)
            with pytest.raises(RuntimeError, match="already running"):
                await stream.aclose()
            await iterating

    run(work())
    assert [line.status for line in lines()] == ["OK"]


def test_what_never_began_is_in_no_log(lines):
    """A stream that nobody reads sends nothing, and nothing is said of it."""

    async def work():
        async with client() as opened, opened.stream(PROMPT, PARAMS):
            pass

    run(work())
    assert lines() == []
