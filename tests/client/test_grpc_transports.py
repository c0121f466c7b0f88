"""Laws of the transports, over gRPC on the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import status_pb2

from specpair import (
    AcceptanceRule,
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    ProtocolError,
    SamplingParams,
    Source,
    SpeculativeClient,
    SyncSpeculativeClient,
    UnavailableError,
)
from specpair.grpc_transports import GrpcTarget
from specpair.messages import Block, Start, Started

from .fakes import continuation
from .loopback import DraftServicer, TargetServicer, half, serving

PROMPT = (3, 4, 5)
PARAMS = SamplingParams(max_new_tokens=30, seed=7)
EXPECTED = continuation(PROMPT, 30, 7)


def run(work):
    """The result of an asynchronous function; no task is left behind."""

    async def checked():
        result = await work()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):  # grpc's own tasks end with their calls
                while asyncio.all_tasks() != {asyncio.current_task()}:  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(0.005)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(checked())


@pytest.mark.parametrize("mode", ["model", "ngram", "none"])
def test_the_wire_changes_nothing(mode):
    """Over gRPC the tokens are those of the model, with every draft."""
    with serving(TargetServicer(), DraftServicer()) as address:

        async def work():
            async with SpeculativeClient(address, address if mode == "model" else mode) as client:
                assert await client.tokenize("ab") == (97 % 50, 98 % 50)
                assert await client.detokenize([1, 2]) == "<1><2>"
                assert (await client.info())[0].model == "target"
                return await client.generate(PROMPT, PARAMS)

        result = run(work)
    assert list(result.token_ids) == EXPECTED
    assert result.stats.proposer == mode
    assert result.stats.proposer_changes == ()


@pytest.mark.parametrize("mode", ["model", "ngram", "none"])
def test_sessions_of_several_turns(mode):
    """Over gRPC each turn continues all that was said, on the slots of the first one, and both end with the session."""
    target, draft = TargetServicer(), DraftServicer()
    with serving(target, draft) as address:

        async def work():
            async with SpeculativeClient(address, address if mode == "model" else mode, draft_length=3) as client:
                async with client.session() as session:
                    results = [await session.generate(prompt, PARAMS) for prompt in (PROMPT, "and", (7,))]
                    assert not target.ended.is_set()
                assert target.ended.wait(5)
                assert draft.ended.is_set() or mode != "model" or draft.ended.wait(5)
                return results

        results = run(work)
    for result in results:
        assert list(result.token_ids) == continuation(result.prompt_token_ids, 30, 7)
        assert result.stats.proposer_changes == ()
    assert [result.stats.cached_tokens for result in results] == [0, 32, 65]


def test_who_is_cancelled_while_waiting_loses_no_message():
    """A receive that is given up does not end the call: the next one gets what it waited for. So it is with a send."""
    target, draft = TargetServicer(delay=0.5), DraftServicer()
    with serving(target, draft) as address:

        async def work():
            service = GrpcTarget(address)
            stream = await service.verify(Start((3, 4, 5), SamplingParams()))
            assert isinstance(await stream.receive(), Started)
            for number, token_id in ((1, 5), (2, continuation((3, 4, 5), 1)[0])):
                sending = asyncio.create_task(stream.send(Block(number, 2 + number, token_id, (), Source.TARGET)))
                await asyncio.sleep(0)
                sending.cancel()
                for _ in range(3):
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(stream.receive(), 0.005)
                assert (await stream.receive()).round == number
            await stream.finish()
            await service.close()

        run(work)
    assert [block.round for block in target.blocks] == [1, 2]


def test_a_chain_of_blocks_over_grpc():
    """Asks that are given up and proposals that nobody waits for any more leave the calls as they are."""
    with serving(TargetServicer(delay=0.002), DraftServicer()) as address:

        async def work():
            async with SpeculativeClient(address, address, draft_length=2, chain=3, lookup=False) as client:
                return await client.generate(PROMPT, PARAMS)

        result = run(work)
    assert list(result.token_ids) == EXPECTED
    assert (result.stats.stale, result.stats.proposer_changes) == (0, ())


@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_closing_a_session_ends_a_turn_that_waits_elsewhere(delay, said):
    """Wherever the turn is, in another task, it gets an error of this package, and is not cancelled. Nobody takes the
    target for lost."""
    target = TargetServicer(delay=delay)
    with serving(target) as address:

        async def work():
            async with SpeculativeClient(address, "ngram") as client:
                session = client.session()
                waiting = asyncio.create_task(session.generate(PROMPT, SamplingParams(max_new_tokens=100_000)))
                async with asyncio.timeout(10):
                    while not target.starts:  # noqa: ASYNC110 - it is another thread's
                        await asyncio.sleep(0.005)
                await session.aclose()
                with pytest.raises(UnavailableError, match="the session has ended: it was closed") as ended:
                    await waiting
                assert ended.value.reason == "SESSION_ENDED"
                assert not waiting.cancelled()
                assert target.ended.wait(5)

        run(work)
    assert said() == []


@pytest.mark.parametrize("mode", ["model", "ngram"])
def test_rejection_rule(mode):
    """A model draft's probabilities reach the target with its ids; prompt lookup is certain and sends none."""
    target = TargetServicer()
    with (
        serving(target, DraftServicer()) as address,
        SyncSpeculativeClient(address, address if mode == "model" else mode, draft_length=3) as client,
    ):
        result = client.generate(PROMPT, SamplingParams(max_new_tokens=30, seed=7, rule=AcceptanceRule.REJECTION))
    assert list(result.token_ids) == EXPECTED
    assert any(block.token_ids for block in target.blocks)
    for block in target.blocks:
        expected = [half(id_) for id_ in block.token_ids] if mode == "model" else []
        assert list(block.draft_probs) == expected


def test_explanations():
    """One for each proposed id and one for the place behind them; the draft's own probabilities if it proposes."""
    with serving(TargetServicer(), DraftServicer()) as address, SyncSpeculativeClient(address, address) as client:
        truth = continuation(PROMPT, 3)
        explained = client.explain(PROMPT, [*truth[:2], truth[2] + 1])
        assert [one.accepted for one in explained] == [True, True, False, False]
        assert [one.proposed_token_id for one in explained] == [*truth[:2], truth[2] + 1, None]
        assert [one.draft_prob for one in explained] == [None] * 4
        explained = client.explain(PROMPT, params=SamplingParams(temperature=1.0, rule=AcceptanceRule.REJECTION))
        assert [one.proposed_token_id for one in explained] == [*continuation(PROMPT, 7), None]
        assert [one.draft_prob for one in explained] == [*[0.5] * 7, None]
        with pytest.raises(InvalidRequestError) as refused:
            client.explain(PROMPT, [-1])
        assert refused.value.field == "token_ids[0]"


@pytest.mark.parametrize(
    "details",
    [
        status_pb2.Status(code=3, message="no slot").SerializeToString(),
        status_pb2.Status(code=8, message="another message").SerializeToString(),
        b"\xff",
        status_pb2.Status(
            code=8,
            message="no slot",
            details=[any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")],
        ).SerializeToString(),
    ],
)
def test_rich_errors_that_contradict_the_status_are_passed_over(details):
    """The call's own code and message stand, whatever a peer or a proxy sends beside them."""

    class Contradicting(TargetServicer):
        def Tokenize(self, request, context):
            context.set_trailing_metadata([("grpc-status-details-bin", details)])
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no slot")

    with serving(Contradicting()) as address, SyncSpeculativeClient(address, "none") as client:
        with pytest.raises(OverloadedError) as refused:
            client.tokenize("a")
        assert (refused.value.message, refused.value.field, refused.value.reason) == ("no slot", "", "")


def test_a_session_ends_politely_on_both_sides():
    """Both services see their streams end, without waiting for a timeout."""
    target, draft = TargetServicer(), DraftServicer()
    with serving(target, draft) as address, SyncSpeculativeClient(address, address) as client:
        client.generate(PROMPT, PARAMS)
        assert target.ended.wait(5)
        assert draft.ended.wait(5)


def test_a_draft_that_hangs_up_is_replaced():
    """A stream that ends early is a lost draft, not an error."""
    with (
        serving(TargetServicer(), DraftServicer(cut_after=2)) as address,
        SyncSpeculativeClient(address, address, draft_length=2) as client,
    ):
        result = client.generate(PROMPT, PARAMS)
    assert list(result.token_ids) == EXPECTED
    (change,) = result.stats.proposer_changes
    assert (change.round, change.proposer) == (3, "ngram")


def test_a_draft_that_is_not_there_is_replaced():
    """A refused connection costs a draft, not a generation."""
    with serving(TargetServicer()) as address, SyncSpeculativeClient(address, "127.0.0.1:1") as client:
        result = client.generate(PROMPT, PARAMS)
    assert list(result.token_ids) == EXPECTED
    assert result.stats.proposer_changes[0].reason.startswith("draft unreachable: ")


def test_errors_come_back_as_they_were_raised():
    """Class, field and reason survive the way."""
    with serving(TargetServicer()) as address, SyncSpeculativeClient(address, "ngram") as client:
        with pytest.raises(InvalidRequestError) as refused:
            client.generate("")
        assert (refused.value.field, refused.value.message) == ("start.prompt", "must not be empty")
        with pytest.raises(OverloadedError) as refused:
            client.generate("full")
        assert refused.value.reason == "KV_SLOTS_EXHAUSTED"
        with pytest.raises(InvalidRequestError) as refused:
            client.generate(PROMPT, SamplingParams(top_k=-1))
        assert refused.value.field == "start.sampling.top_k"


def test_a_target_that_hangs_up_breaks_the_protocol():
    """A stream that ends without a finish reason is an error, even if its status is OK, to who does not resume."""
    with (
        serving(TargetServicer(cut_after=2)) as address,
        SyncSpeculativeClient(address, "ngram", resume_timeout=0) as client,
        pytest.raises(ProtocolError),
    ):
        client.generate(PROMPT, PARAMS)


def test_a_target_that_is_not_there():
    """A refused connection is UnavailableError for every call."""
    with SyncSpeculativeClient("127.0.0.1:1", "none") as client:
        for call in (client.info, lambda: client.tokenize("a"), lambda: client.generate(PROMPT, PARAMS)):
            with pytest.raises(UnavailableError):
                call()
        assert client.healthy() == (False, None)


@pytest.mark.parametrize("mode", ["ngram", "none"])
def test_leaving_a_stream_cancels_at_the_service(mode):
    """The service sees the end of the call at once."""
    target = TargetServicer(delay=0.02)
    with serving(target) as address:

        async def work():
            async with SpeculativeClient(address, mode) as client, client.stream(PROMPT) as stream:
                await anext(stream)

        run(work)
        assert target.ended.wait(5)


@pytest.mark.parametrize("mode", ["ngram", "none"])
def test_deadlines(mode):
    """The caller's time limit ends the call on both sides."""
    target = TargetServicer(delay=0.05)
    with serving(target) as address, SyncSpeculativeClient(address, mode) as client:
        begin = time.monotonic()
        with pytest.raises(DeadlineError):
            client.generate(PROMPT, timeout=0.3)
        assert time.monotonic() - begin < 10
        assert target.ended.wait(5)


def test_the_service_is_told_the_deadline():
    """The time limit travels as the call's own deadline too."""

    async def work():
        target = GrpcTarget(address)

        async def generate():
            stream = await target.generate(Start(PROMPT, SamplingParams()), 0.2)
            await asyncio.wait_for(stream.finish(), 5)

        with pytest.raises(DeadlineError):
            await generate()
        await target.close()

    with serving(TargetServicer(delay=0.05)) as address:
        run(work)


def test_a_closed_client_says_so():
    """Using it is an error of this package."""

    async def work():
        client = SpeculativeClient("127.0.0.1:1", "none")
        await client.aclose()
        with pytest.raises(UnavailableError, match="closed"):
            await client.generate(PROMPT)

    run(work)


def test_cancelled_before_it_began():
    """A call whose connection is never answered leaves nothing behind when it is given up."""

    async def work():
        target = GrpcTarget(f"127.0.0.1:{silent.getsockname()[1]}")
        opening = asyncio.create_task(target.verify(Start(PROMPT, SamplingParams())))
        await asyncio.sleep(0.1)
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await opening
        await target.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        run(work)
