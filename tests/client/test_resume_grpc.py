"""Laws of resuming over gRPC on the loopback interface: what a failed call says about why it failed."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from math import inf

import grpc
import pytest

from specpair import InternalError, OverloadedError, SamplingParams, SpeculativeClient, UnavailableError
from specpair.errors import SpecpairError, to_status
from specpair.losses import is_lost

from .fakes import continuation
from .loopback import Breaking, DraftServicer, TargetServicer, serving

PROMPT = (3, 4, 5)
COUNT = 30
PARAMS = SamplingParams(max_new_tokens=COUNT, seed=7)
EXPECTED = continuation(PROMPT, COUNT, 7)


def generate(target, mode, **options):
    with serving(target, DraftServicer()) as address:

        async def run():
            async with SpeculativeClient(address, address if mode == "model" else mode, **options) as client:
                return await client.generate(PROMPT, PARAMS)

        return asyncio.run(run())


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.OK,
    ],
    ids=lambda code: code.name,
)
@pytest.mark.parametrize("mode", ["model", "ngram", "none"])
def test_what_comes_from_the_way_is_resumed(mode, code):
    """Statuses of proxies and of dying services, without a request id, and an end without a word."""
    target = Breaking(code)
    result = generate(target, mode, draft_length=1, chain=2)
    assert list(result.token_ids) == EXPECTED
    assert (result.stats.resumes, target.calls) == (1, 2)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED], ids=lambda code: code.name)
def test_a_service_that_stops_is_resumed(code):
    """Also when it says so itself, with a request id."""
    target = Breaking(code, ("x-request-id", "r-1"))
    assert generate(target, "none").stats.resumes == 1


@pytest.mark.parametrize(
    ("code", "trailing", "kind"),
    [
        (grpc.StatusCode.INTERNAL, ("x-request-id", "r-1"), InternalError),
        (grpc.StatusCode.UNKNOWN, ("x-request-id", "r-1"), InternalError),
        (grpc.StatusCode.PERMISSION_DENIED, ("x", "y"), InternalError),
        (grpc.StatusCode.UNAVAILABLE, ("grpc-retry-pushback-ms", "-1"), UnavailableError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ("x", "y"), OverloadedError),
    ],
)
def test_what_is_the_targets_own_word_is_not_resumed(code, trailing, kind):
    """The caller gets it as it is."""
    target = Breaking(code, trailing)
    with pytest.raises(kind, match="broken"):
        generate(target, "none")
    assert target.calls == 1


def test_a_full_target_is_resumed_after_its_hint():
    """The trailing metadata that gRPC's own retries go by, or RetryInfo."""
    target = Breaking(grpc.StatusCode.RESOURCE_EXHAUSTED, ("grpc-retry-pushback-ms", "50"))
    assert generate(target, "none").stats.resumes == 1
    status = to_status(OverloadedError("broken", retry_after=0.05)).SerializeToString()
    target = Breaking(grpc.StatusCode.RESOURCE_EXHAUSTED, ("grpc-status-details-bin", status))
    assert generate(target, "none").stats.resumes == 1


@pytest.mark.parametrize(
    ("trailing", "retry_after", "request_id"),
    [
        ((), None, ""),
        ((("x-request-id", "r-1"),), None, "r-1"),
        ((("grpc-retry-pushback-ms", "1500"),), 1.5, ""),
        ((("grpc-retry-pushback-ms", "0"),), 0.0, ""),
        ((("grpc-retry-pushback-ms", "-1"),), inf, ""),
        ((("grpc-retry-pushback-ms", "soon"),), inf, ""),
    ],
)
def test_what_trailing_metadata_says(trailing, retry_after, request_id):
    """When to try again, and under which id the log of the service has the call."""

    class Refusing(TargetServicer):
        def Tokenize(self, request, context):
            context.set_trailing_metadata(trailing)
            context.abort(grpc.StatusCode.INTERNAL, "refused")

    async def ask(address):
        async with SpeculativeClient(address, "none") as client:
            await client.tokenize("a")

    with serving(Refusing()) as address, pytest.raises(SpecpairError) as refused:
        asyncio.run(ask(address))
    assert (refused.value.retry_after, refused.value.request_id) == (retry_after, request_id)
    assert is_lost(refused.value) == (not request_id and retry_after != inf)


@pytest.mark.parametrize("mode", ["model", "ngram", "none"])
def test_a_service_that_starts_again_at_its_address(mode, caplog):
    """The stream of a server that is stopped and started again under way: the same tokens, one resume."""
    caplog.set_level(logging.WARNING, "specpair")

    async def run():
        with ExitStack() as first, ExitStack() as others:
            address = first.enter_context(serving(TargetServicer(delay=0.1)))
            draft = others.enter_context(serving(None, DraftServicer()))
            async with (
                SpeculativeClient(address, draft if mode == "model" else mode, draft_length=1) as client,
                client.stream(PROMPT, PARAMS) as stream,
            ):
                await anext(stream)
                await asyncio.to_thread(first.close)
                others.enter_context(serving(TargetServicer(), listen=address))
                async for _ in stream:
                    pass
        return stream.result

    result = asyncio.run(run())
    assert list(result.token_ids) == EXPECTED
    assert result.stats.resumes == 1
    assert "target lost" in caplog.text


@pytest.mark.parametrize("mode", ["ngram", "none"])
def test_a_session_whose_service_starts_again_between_two_turns(mode):
    """The next turn goes on behind everything before it."""

    async def run():
        with ExitStack() as first:
            address = first.enter_context(serving(TargetServicer()))
            async with SpeculativeClient(address, mode) as client, client.session() as session:
                results = [await session.generate(PROMPT, PARAMS)]
                await asyncio.to_thread(first.close)
                with serving(TargetServicer(), listen=address):
                    results += [await session.generate(prompt, PARAMS) for prompt in (" and", (7,))]
        return results

    results = asyncio.run(run())
    for result in results:
        assert list(result.token_ids) == continuation(result.prompt_token_ids, COUNT, 7)
    assert [result.stats.resumes for result in results] == [0, 1, 0]
