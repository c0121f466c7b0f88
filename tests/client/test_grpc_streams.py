"""Laws of one call over gRPC: whatever moment its end comes at, it says what the service said, and leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import contextmanager

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
)
from specpair.grpc_transports import GrpcDraft, GrpcTarget
from specpair.messages import Block, DraftStart, Start, Started

from .fakes import continuation
from .loopback import DraftServicer, TargetServicer, fail, serving

PROMPT = (3, 4, 5)
PARAMS = SamplingParams(max_new_tokens=30, seed=7)
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

    def Verify(self, requests, context):
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


def test_a_session_that_is_refused_unread_is_not_tried_again():
    """The caller gets the refusal of the first call, and no draft is taken for lost."""

    async def work():
        async with SpeculativeClient(address, "ngram") as client:
            for _ in range(TRIES):
                with pytest.raises(UnauthenticatedError, match="no token"):
                    await client.generate(PROMPT, PARAMS)

    with serving(Unread()) as address:
        asyncio.run(work())


class Breaking(TargetServicer):
    """Ends its calls, with its own word, while blocks are on their way."""

    def __init__(self, code):
        super().__init__()
        self.code = code

    def Verify(self, requests, context):
        for n, answer in enumerate(super().Verify(requests, context)):
            if n == 3:
                context.set_trailing_metadata([("x-request-id", "r-1")])
                context.abort(self.code, "broken")
            yield answer


@pytest.mark.parametrize(
    ("code", "kind"),
    [(grpc.StatusCode.INTERNAL, InternalError), (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError)],
    ids=["internal", "full"],
)
def test_the_last_word_is_heard_by_who_sends_blocks_ahead(code, kind):
    """A call that ends while a block is written is not resumed where the service has said that it is not to be."""

    async def work():
        async with SpeculativeClient(address, address, draft_length=1, chain=3, lookup=False) as client:
            for number in range(1, TRIES + 1):
                with pytest.raises(kind, match="broken"):
                    await client.generate(PROMPT, PARAMS)
                assert len(target.starts) == number

    target = Breaking(code)
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


class Cut(TargetServicer):
    """Its first call ends after a few answers."""

    def Verify(self, requests, context):
        self.cut_after = 2 if not self.starts else None
        return super().Verify(requests, context)


class Gone(Cut):
    """And every other one at once."""

    def Verify(self, requests, context):
        if self.starts:
            fail(context, UnavailableError("no target is left"))
        return super().Verify(requests, context)


@pytest.mark.parametrize(
    "case", ["draft lost", "target lost", "target gone", "refused", "out of time", "cancelled", "closed"]
)
def test_a_closed_client_has_let_go_of_its_calls(case):
    """However they ended, and before the garbage collector comes: a call holds its connection, which would try for ever
    to reach a service that is gone.
    """
    targets = {"target lost": Cut(), "target gone": Gone()}
    target = targets.get(case) or TargetServicer(delay=0.05 if case in ("cancelled", "closed") else 0)
    draft = DraftServicer(cut_after=2 if case == "draft lost" else None)

    async def end(client):
        if case == "refused":
            with pytest.raises(OverloadedError):
                await client.generate("full")
        elif case == "target gone":
            with pytest.raises(UnavailableError, match="no target is left"):
                await client.generate(PROMPT, PARAMS)
        elif case == "out of time":
            with pytest.raises(DeadlineError):
                await client.generate(PROMPT, SamplingParams(max_new_tokens=100_000), timeout=0.1)
        elif case == "cancelled":
            task = asyncio.create_task(client.generate(PROMPT, PARAMS))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif case == "closed":
            session = client.session()
            task = asyncio.create_task(session.generate(PROMPT, PARAMS))
            await asyncio.sleep(0.2)
            await session.aclose()
            with pytest.raises(UnavailableError):
                await task
        else:
            result = await client.generate(PROMPT, PARAMS)
            assert list(result.token_ids) == continuation(PROMPT, 30, 7)
            assert (len(result.stats.proposer_changes), result.stats.resumes) == (case[0] == "d", case[0] == "t")

    async def work():
        async with SpeculativeClient(address, address, draft_length=2, lookup=False, resume_timeout=1.0) as client:
            await end(client)

    with serving(target, draft) as address, without_collector():
        known = calls()
        asyncio.run(work())
        assert [call for call in calls() if call not in known] == []
