"""Exceptions become statuses, and every call leaves one log line."""

from __future__ import annotations

import asyncio
import contextlib
import time

import grpc
import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from specpair import errors
from specpair.v1 import common_pb2, target_pb2
from specpair_runtime.serving import CallInterceptor


def _prompt(text):
    return common_pb2.Prompt(text=text)


def _start(text):
    return target_pb2.VerifyRequest(start=target_pb2.SessionStart(prompt=_prompt(text)))


async def _call(stub, kind, text):
    """Makes a call of the given kind to the end."""
    match kind:
        case "unary":
            await stub.Tokenize(target_pb2.TokenizeRequest(prompt=_prompt(text)))
        case "server stream":
            async for _ in stub.Generate(target_pb2.GenerateRequest(prompt=_prompt(text))):
                pass
        case "stream":
            async for _ in stub.Verify(iter([_start(text)])):
                pass


@contextlib.contextmanager
def _calls():
    """Collects the lines logged at the end of calls."""
    lines = []

    def collect(logger, method, line):
        if line["event"] == "call":
            lines.append({**line, "log_level": method})
        return line

    with capture_logs(processors=[merge_contextvars, collect]):
        yield lines


KINDS = ["unary", "server stream", "stream"]


@pytest.mark.parametrize("kind", KINDS)
def test_typed_error_arrives_whole(running, kind):
    """Whatever the kind of call, the client gets the class, message, field and reason that the handler raised."""

    async def check():
        async with running() as service:
            with pytest.raises(grpc.RpcError) as failed:
                await _call(service.stub, kind, "invalid")
            error = errors.from_rpc_error(failed.value)
            assert type(error) is errors.InvalidRequestError
            assert (error.message, error.field, error.reason) == ("must not be so", "start.prompt.text", "NOT_SO")

    asyncio.run(check())


@pytest.mark.parametrize("kind", KINDS)
def test_unexpected_exception_does_not_leak(running, fake, kind):
    """An unexpected exception is INTERNAL to the client, which learns the request id and nothing of the text."""

    async def check():
        async with running() as service:
            with capture_logs(processors=[merge_contextvars]) as logs, pytest.raises(grpc.RpcError) as failed:
                await _call(service.stub, kind, "crash")
            assert failed.value.code() is grpc.StatusCode.INTERNAL
            request_id = dict(failed.value.trailing_metadata())["x-request-id"]
            seen = failed.value.details() + str(failed.value.trailing_metadata())
            assert fake.SECRET not in seen
            assert "RuntimeError" not in seen
            assert request_id in failed.value.details()
            logged = next(line for line in logs if line["event"] == "unexpected error")
            assert logged["exc_info"]
            assert logged["request_id"] == request_id

    asyncio.run(check())


class _CollectServicer:
    """A client-streaming method, of which the protocol has none."""

    SERVICE = "test.Collect"

    async def collect(self, request_iterator, context):
        async for request in request_iterator:
            if request == b"invalid":
                raise errors.InvalidRequestError("no", field="request")
            if request == b"crash":
                raise RuntimeError("secret")
        return b"done"


def test_client_streaming_is_wrapped_too():
    """Client-streaming calls map errors, mask exceptions, and log one line like the others."""

    async def check():
        server = grpc.aio.server(interceptors=[CallInterceptor()])
        handler = grpc.stream_unary_rpc_method_handler(_CollectServicer().collect)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Collect", {"Run": handler})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = channel.stream_unary("/test.Collect/Run")
                with _calls() as calls:
                    assert await call(iter([b"a", b"b"])) == b"done"
                    with pytest.raises(grpc.RpcError) as failed:
                        await call(iter([b"invalid"]))
                    assert errors.from_rpc_error(failed.value).field == "request"
                    with pytest.raises(grpc.RpcError) as failed:
                        await call(iter([b"crash"]))
                    assert failed.value.code() is grpc.StatusCode.INTERNAL
                    assert "secret" not in failed.value.details()
                    async with asyncio.timeout(10):
                        while len(calls) < 3:  # noqa: ASYNC110 - a line follows its status
                            await asyncio.sleep(0.005)
                assert [line["status"] for line in calls] == ["OK", "INVALID_ARGUMENT", "INTERNAL"]
        finally:
            await server.stop(None)

    asyncio.run(check())


def test_one_line_per_call(running):
    """A call's one log line has method, peer, status, seconds, request id and the handler's annotations; no text."""

    async def check():
        async with running() as service:
            with _calls() as calls:
                requests = [_start("some prompt"), target_pb2.VerifyRequest(block=target_pb2.Block(round=7))]
                async for _ in service.stub.Verify(iter(requests), metadata=(("x-request-id", "mine-1"),)):
                    pass
            (line,) = calls
            assert line["method"] == "/specpair.v1.TargetService/Verify"
            assert line["peer"].startswith("ipv4:127.0.0.1:")
            assert line["status"] == "OK"
            assert 0 < line["seconds"] < 5
            assert line["request_id"] == "mine-1"
            assert line["rounds"] == 7
            assert "some prompt" not in str(line)

    asyncio.run(check())


@pytest.mark.parametrize("sent", ["mine-1", "", "two words", "x" * 129])
def test_request_id_goes_back(running, sent):
    """A sane request id comes back in the trailing metadata; anything else is replaced by a fresh one."""

    async def check():
        async with running() as service:
            call = service.stub.Tokenize(target_pb2.TokenizeRequest(), metadata=(("x-request-id", sent),))
            await call
            back = [value for key, value in await call.trailing_metadata() if key == "x-request-id"]
            if sent == "mine-1":
                assert back == [sent]
            else:
                assert len(back) == 1
                assert len(back[0]) == 32

    asyncio.run(check())


def test_trailing_metadata_of_the_handler_is_kept(running):
    """What a handler put into the trailing metadata reaches the client beside the error's details."""

    async def check():
        async with running() as service:
            with pytest.raises(grpc.RpcError) as failed:
                await service.stub.Tokenize(target_pb2.TokenizeRequest(prompt=_prompt("overloaded")))
            trailing = dict(failed.value.trailing_metadata())
            assert trailing["x-note"] == "from the handler"
            assert trailing["x-request-id"]
            assert errors.from_rpc_error(failed.value).reason == "KV_SLOTS_EXHAUSTED"

    asyncio.run(check())


def test_overload_says_when_to_try_again(running):
    """A full service tells gRPC's own retries and the client when another try makes sense."""

    async def check():
        async with running() as service:
            with pytest.raises(grpc.RpcError) as failed:
                await service.stub.Tokenize(target_pb2.TokenizeRequest(prompt=_prompt("overloaded")))
            assert dict(failed.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1500"
            assert errors.from_rpc_error(failed.value).retry_after == 1.5

    asyncio.run(check())


@pytest.mark.parametrize("how", ["cancelled", "deadline", "dropped channel"])
@pytest.mark.parametrize("reading", [True, False])
def test_abandoned_stream_ends_its_handler(running, how, reading):
    """When the client goes away, the handler's `finally` runs and the call's line is logged."""

    async def check():
        async with running() as service:
            timeout = 1.0 if how == "deadline" else None
            channel = grpc.aio.insecure_channel(service.address)
            stub = type(service.stub)(channel)
            with _calls() as calls:
                if reading:
                    stream = stub.Verify(timeout=timeout)
                    await stream.write(_start("x"))
                else:
                    stream = stub.Generate(target_pb2.GenerateRequest(prompt=_prompt("endless")), timeout=timeout)
                await stream.read()
                if how == "cancelled":
                    stream.cancel()
                elif how == "deadline":
                    # Both sides share this loop. The client gives up as its own clock says; the service, which gets to
                    # know of it when the loop goes on, has passed the deadline by then.
                    time.sleep(timeout + 0.2)  # noqa: ASYNC251
                    with contextlib.suppress(grpc.RpcError):
                        while True:
                            await stream.read()
                else:
                    await channel.close()
                await service.until(lambda: service.servicer.open_sessions == 0)
                await service.until(lambda: calls)
                await asyncio.sleep(0.1)
            await channel.close()
            (line,) = calls
            expected = "DEADLINE_EXCEEDED" if how == "deadline" else "CANCELLED"
            # A handler that reads may see no more than the end of the requests.
            assert line["status"] == expected or (reading and line["status"] == "OK")

    asyncio.run(check())
