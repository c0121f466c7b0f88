"""Laws of one call over gRPC: whatever moment its end comes at, it says what the service said, and leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from contextlib import contextmanager
from statistics import median

import grpc
import pytest
from grpc import aio

from specpair import (
    DeadlineError,
    InternalError,
    OverloadedError,
    SamplingParams,
    Source,
    SpeculativeClient,
    UnauthenticatedError,
    UnavailableError,
    grpc_streams,
)
from specpair.grpc_transports import GrpcDraft, GrpcTarget
from specpair.messages import Block, DraftStart, Start, Started

from .fakes import continuation
from .loopback import Breaking, DraftServicer, TargetServicer, fail, serving

PROMPT = (3, 4, 5)
PARAMS = SamplingParams(max_new_tokens=30, seed=7)
LONG = SamplingParams(max_new_tokens=100_000)
START = Start(PROMPT, SamplingParams())
BLOCK = Block(1, 2, 5, (), Source.TARGET)
# A call meets its own end in about every second of such tries.
TRIES = 50


@contextmanager
def without_collector():
    """Only what is in no circle goes away."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def calls():
    # Not by isinstance, which asks objects of other packages for their `__class__`.
    return [each for each in gc.get_objects() if issubclass(type(each), aio.Call)]


class Unread(TargetServicer):
    """Refuses calls before it has read anything of them."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def Verify(self, requests, context):
        self.calls += 1
        fail(context, UnauthenticatedError("no token"))


class UnreadDraft(DraftServicer):
    def Propose(self, requests, context):
        fail(context, UnavailableError("the service stops", reason="DRAINING"))


def test_who_is_refused_unread_is_told_why():
    """The refusal comes while the first message is on its way: at either end of the call it is the service's own."""

    async def work():
        target, draft = GrpcTarget(address), GrpcDraft(address)
        for _ in range(TRIES):
            with pytest.raises(UnauthenticatedError, match="no token"):
                await (await target.verify(START)).receive()
            with pytest.raises(UnavailableError) as refused:
                await (await draft.propose(DraftStart(PROMPT, SamplingParams()))).receive()
            assert refused.value.reason == "DRAINING"
        await target.close()
        await draft.close()

    with serving(Unread(), UnreadDraft()) as address:
        asyncio.run(work())


def test_a_session_that_is_refused_unread_is_not_tried_again(said):
    """The caller gets the refusal of the first call, and nothing is taken for lost."""
    target = Unread()

    async def work():
        async with SpeculativeClient(address, address, lookup=False) as client:
            for number in range(1, TRIES + 1):
                with pytest.raises(UnauthenticatedError, match="no token"):
                    await client.generate(PROMPT, PARAMS)
                assert target.calls == number

    with serving(target, DraftServicer()) as address:
        asyncio.run(work())
    assert said() == []


def test_a_draft_that_is_refused_unread_says_why(said):
    """What the client's log says of a draft that is replaced is the draft service's own word."""

    async def work():
        for _ in range(TRIES // 5):
            async with SpeculativeClient(address, address, lookup=False, draft_timeout=60) as client:
                result = await client.generate(PROMPT, PARAMS)
                assert list(result.token_ids) == continuation(PROMPT, 30, 7)

    with serving(TargetServicer(), UnreadDraft()) as address:
        asyncio.run(work())
    assert said()
    assert all("the service stops" in line for line in said())


@pytest.mark.parametrize(
    ("code", "kind"),
    [(grpc.StatusCode.INTERNAL, InternalError), (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError)],
    ids=["internal", "full"],
)
def test_the_last_word_is_heard_by_who_sends_blocks_ahead(code, kind, said):
    """A call that ends while a block is written is not resumed where the service has said that it is not to be."""

    async def work():
        async with SpeculativeClient(address, address, draft_length=1, chain=3, lookup=False) as client:
            for number in range(1, TRIES + 1):
                with pytest.raises(kind, match="broken"):
                    await client.generate(PROMPT, PARAMS)
                assert len(target.starts) == number, said()

    target = Breaking(code, ("x-request-id", "r-1"), always=True)
    with serving(target, DraftServicer()) as address:
        asyncio.run(work())


def test_saying_good_bye_to_who_has_gone():
    """A stream that the service ends while this side does is an error of this package, or the end."""

    class Leaving(TargetServicer):
        def Verify(self, requests, context):
            answers = super().Verify(requests, context)
            yield next(answers)
            fail(context, UnavailableError("the service stops", reason="DRAINING"))

    async def work():
        target = GrpcTarget(address)
        for _ in range(TRIES):
            stream = await target.verify(START)
            assert isinstance(await stream.receive(), Started)
            time.sleep(0.01)  # noqa: ASYNC251 - what comes now is not known to this thread
            with pytest.raises(UnavailableError) as ended:
                await stream.finish()
            assert ended.value.reason == "DRAINING"
        await target.close()

    with serving(Leaving()) as address:
        asyncio.run(work())


def test_saying_good_bye_too_late():
    """A stream whose time is over ends with that, also when it is over at this very moment."""

    async def work():
        target = GrpcTarget(address)
        for _ in range(5):
            try:
                stream = await target.verify(START, 0.2)
                assert isinstance(await stream.receive(), Started)
            except DeadlineError:
                continue  # a busy machine
            time.sleep(0.21)  # noqa: ASYNC251 - what comes now is not known to this thread
            with pytest.raises(DeadlineError):
                await stream.finish()
        await target.close()

    with serving(TargetServicer()) as address:
        asyncio.run(work())


def test_closing_ends_what_waits():
    """Whoever waits for an answer, or sends, is told at once, and nobody is taken for lost."""

    async def closed(*waiting):
        await asyncio.sleep(0.05)
        async with asyncio.timeout(10):
            await target.close()
            ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert [(type(error), error.reason) for error in ended] == [(UnavailableError, "CLOSED")] * len(waiting)

    async def work():
        streams = [await target.verify(START), await target.generate(START)]
        for stream in streams:
            assert isinstance(await stream.receive(), Started)
        await closed(*(asyncio.create_task(stream.receive()) for stream in streams))
        for attempt in (streams[0].send(BLOCK), streams[0].receive(), streams[0].finish()):
            with pytest.raises(UnavailableError) as ended:
                await attempt
            assert ended.value.reason == "CLOSED"

    async def work_without_a_connection():
        await closed(asyncio.create_task(target.verify(START)))

    with serving(TargetServicer(delay=5)) as address:
        target = GrpcTarget(address)
        asyncio.run(work())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = GrpcTarget(f"127.0.0.1:{silent.getsockname()[1]}")
        asyncio.run(work_without_a_connection())


@pytest.mark.parametrize("mode", ["model", "ngram", "none"])
def test_closing_a_client_ends_its_generations(mode, said):
    """At whatever moment: they fail, and neither service is taken for lost."""

    async def work():
        for number in range(20):
            draft = address if mode == "model" else mode
            async with SpeculativeClient(address, draft, draft_length=1, lookup=False) as client:
                generations = [asyncio.create_task(client.generate(PROMPT, LONG)) for _ in range(2)]
                await asyncio.sleep(0.002 * number)
            for error in await asyncio.gather(*generations, return_exceptions=True):
                assert (type(error), error.reason) == (UnavailableError, "CLOSED")

    with serving(TargetServicer(delay=0.001), DraftServicer()) as address:
        asyncio.run(work())
    assert said() == []


def test_given_up_before_it_began():
    """What is cancelled in the turn of the event loop in which it was asked for leaves no trace."""

    async def work():
        service = GrpcTarget(address)
        stream = await service.verify(START)
        sending = [asyncio.create_task(stream.send(BLOCK)) for _ in range(3)]
        await asyncio.sleep(0)
        stream.cancel()
        for error in await asyncio.gather(*sending, return_exceptions=True):
            assert (type(error), error.reason) == (UnavailableError, "CLOSED")
        await service.close()

    with serving(TargetServicer(delay=0.05)) as address:
        asyncio.run(work())
        gc.collect()


@pytest.mark.parametrize("mode", ["model", "none"])
def test_a_grpc_that_is_made_otherwise(mode, monkeypatch):
    """Without what this takes from inside gRPC the tokens are the same."""
    monkeypatch.setattr(grpc_streams, "_SEND", "something else")

    async def work():
        async with SpeculativeClient(address, address if mode == "model" else mode, lookup=False) as client:
            assert list((await client.generate(PROMPT, PARAMS)).token_ids) == continuation(PROMPT, 30, 7)

    with serving(TargetServicer(), DraftServicer()) as address:
        asyncio.run(work())


def test_a_stream_that_was_given_up_is_not_lost():
    """Whatever is still tried on it says that this side has ended it, which nobody resumes after."""

    async def work():
        service = GrpcTarget(address)
        stream = await service.verify(START)
        assert isinstance(await stream.receive(), Started)
        stream.cancel()
        for attempt in (stream.send, lambda _: stream.receive(), stream.send, lambda _: stream.finish()):
            with pytest.raises(UnavailableError) as ended:
                await attempt(BLOCK)
            assert ended.value.reason == "CLOSED"
        stream.cancel()
        await service.close()

    with serving(TargetServicer(delay=0.05)) as address:
        asyncio.run(work())


class Gone(Breaking):
    """And refuses every other call."""

    def Verify(self, requests, context):
        if self.calls:
            fail(context, UnavailableError("no target is left"))
        return super().Verify(requests, context)


def calls_left(case):
    """What a client leaves that has ended in this way, but for what the garbage collector takes."""
    targets = {"target lost": Breaking(grpc.StatusCode.OK), "target gone": Gone(grpc.StatusCode.OK)}
    # gRPC itself keeps a call in a circle that is cancelled before its beginning is known here, as that of a draft may
    # be: here it is the target's alone, which has sent something.
    under_way = case in ("out of time", "cancelled", "closed")
    target = targets.get(case) or TargetServicer(delay=0.05 if under_way else 0)
    draft = DraftServicer(cut_after=2 if case == "draft lost" else None)

    async def begun():
        async with asyncio.timeout(10):
            while not target.blocks:  # noqa: ASYNC110 - it is another thread's
                await asyncio.sleep(0.005)

    async def end(client):
        if case == "refused":
            with pytest.raises(OverloadedError):
                await client.generate("full")
        elif case == "target gone":
            with pytest.raises(UnavailableError, match="no target is left"):
                await client.generate(PROMPT, PARAMS)
        elif case == "out of time":
            with pytest.raises(DeadlineError):
                await client.generate(PROMPT, LONG, timeout=0.5)
        elif case == "cancelled":
            task = asyncio.create_task(client.generate(PROMPT, LONG))
            await begun()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif case == "closed":
            session = client.session()
            task = asyncio.create_task(session.generate(PROMPT, LONG))
            await begun()
            await session.aclose()
            with pytest.raises(UnavailableError):
                await task
        else:
            result = await client.generate(PROMPT, PARAMS)
            assert list(result.token_ids) == continuation(PROMPT, 30, 7)
            assert (len(result.stats.proposer_changes), result.stats.resumes) == (case[0] == "d", case[0] == "t")

    async def work():
        options = {"draft_length": 2, "draft_timeout": 60, "lookup": False, "resume_timeout": 1.0}
        async with SpeculativeClient(address, "ngram" if under_way else address, **options) as client:
            await end(client)

    with serving(target, draft) as address, without_collector():
        known = calls()
        asyncio.run(work())
        return len([call for call in calls() if call not in known])


@pytest.mark.parametrize(
    "case", ["draft lost", "target lost", "target gone", "refused", "out of time", "cancelled", "closed"]
)
def test_a_closed_client_has_let_go_of_its_calls(case):
    """However they ended, and before the garbage collector comes: a call holds its connection, which would try for ever
    to reach a service that is gone.
    """
    assert median(calls_left(case) for _ in range(3)) == 0
