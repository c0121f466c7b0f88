"""The transports over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Generic, NoReturn, TypeVar

import grpc
from google.protobuf.message import Message
from grpc import aio

from specpair import wire
from specpair.addresses import names_several
from specpair.credentials import Access, Credentials
from specpair.errors import ProtocolError, SpecpairError, UnavailableError, from_rpc_error
from specpair.handshake import explained
from specpair.messages import (
    Block,
    Committed,
    DraftAsk,
    DraftStart,
    DraftStarted,
    Explain,
    Extend,
    ModelInfo,
    Proposal,
    Start,
    Started,
    Verdict,
)
from specpair.params import Prompt
from specpair.request import RequestContext
from specpair.results import PositionExplanation
from specpair.transports import CLOSED, STREAM_ENDED, ProposeStream, Receiver, VerifyStream
from specpair.v1 import draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc

__all__ = ["GrpcDraft", "GrpcTarget"]

_MESSAGE_LIMIT = 4 * 1024 * 1024
_OPTIONS = (
    # Servers answer pings more frequent than this with GOAWAY unless they are told otherwise.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # This is the time that a ping is waited for; the one above is that of bytes which nobody acknowledges.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
    ("grpc.max_send_message_length", _MESSAGE_LIMIT),
    # A service that was restarted is met again soon: gRPC's own waits grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
# Where an address stands for several servers every call goes to the next one that is connected and says of itself that
# it serves. A session is one call, so it stays where it began.
_SPREAD = (
    (
        "grpc.service_config",
        json.dumps({"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}),
    ),
    # A server that comes back may have another address; gRPC looks a name up after a loss, and not again for 30 s.
    ("grpc.dns_min_time_between_resolutions_ms", 5000),
)
_VERIFY, _GENERATE = "specpair.v1.TargetService/Verify", "specpair.v1.TargetService/Generate"
_PROPOSE = "specpair.v1.DraftService/Propose"
# grpc.health.v1.HealthCheckResponse with status SERVING, field 1 = 1.
_SERVING = b"\x08\x01"

Received = TypeVar("Received")
Sent = TypeVar("Sent")
Made = TypeVar("Made", bound=aio.Call)
_Metadata = tuple[tuple[str, str], ...]
_Call = aio.StreamStreamCall[Any, Any] | aio.UnaryStreamCall[Any, Any]


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Failed calls become exceptions of `specpair.errors`; so do calls that somebody else has given up."""
    try:
        yield
    except grpc.RpcError as failed:
        raise explained(from_rpc_error(failed)) from None
    except asyncio.CancelledError:
        # grpc raises it for a call that was cancelled here, too: then nobody has cancelled this task.
        if (task := asyncio.current_task()) is None or task.cancelling():
            raise
        raise _given_up() from None
    except aio.UsageError:
        raise UnavailableError("the client is closed", reason=CLOSED) from None


def _given_up() -> UnavailableError:
    return UnavailableError("the call was ended on this side", reason=CLOSED)


class _GrpcStream(Generic[Sent, Received]):
    """A call with a stream of responses, and perhaps one of requests.

    gRPC ends a call when a task that reads or writes is cancelled; here it is not more than the task that ends. For
    that each operation runs as a task of its own, and the next one of its kind waits for it.
    """

    def __init__(self, call: _Call, decode: Callable[[Any], Received], encode: Callable[[Sent], Message]) -> None:
        self._call = call
        self._decode = decode
        self._encode = encode
        self._reading: asyncio.Future[Any] | None = None
        self._writing: asyncio.Future[None] | None = None
        self._cancelled = False

    async def send(self, message: Sent) -> None:
        await self._write(self._encode(message))

    async def receive(self) -> Received:
        with _translated():
            response = await self._read()
        if response is aio.EOF:
            raise ProtocolError("the service ended the stream early", reason=STREAM_ENDED)
        if response is None:
            raise ProtocolError("the service sent bytes that are no message")
        return self._decode(response)

    async def finish(self) -> None:
        with _translated():
            if isinstance(self._call, aio.StreamStreamCall):
                if self._writing is not None:
                    await asyncio.wait((self._writing,))
                await self._call.done_writing()
            while await self._read() is not aio.EOF:
                pass

    def cancel(self) -> None:
        self._cancelled |= self._call.cancel()  # false: it had ended before
        if self._writing is not None:
            # A call that has not got as far as its metadata never wakes who waits to write.
            self._writing.cancel()

    async def _read(self) -> Any:  # noqa: ANN401 - what gRPC reads
        if self._reading is None:
            self._reading = _on_its_own(self._call.read())
        response = await asyncio.shield(self._reading)
        self._reading = None
        return response

    async def _write(self, request: Message) -> None:
        self._writing = _on_its_own(self._write_behind(self._writing, request))
        with _translated():
            try:
                await asyncio.shield(self._writing)
                return
            except asyncio.InvalidStateError:
                pass
        raise await self._status()

    async def _status(self) -> SpecpairError:
        """Why the call has ended. What the service said before is of no use to who wants to say more."""
        if self._cancelled:
            return _given_up()
        call = self._call
        if (code := await call.code()) is grpc.StatusCode.OK:
            return ProtocolError("the service ended the stream early", reason=STREAM_ENDED)
        initial, trailing = await call.initial_metadata(), await call.trailing_metadata()
        return explained(from_rpc_error(aio.AioRpcError(code, initial, trailing, await call.details())))

    async def _write_behind(self, last: asyncio.Future[None] | None, request: Message) -> None:
        assert isinstance(self._call, aio.StreamStreamCall)
        if last is not None and not last.done():
            await last
        await self._call.write(request)

    @classmethod
    async def open(
        cls, call: _Call, first: Message, decode: Callable[[Any], Received], encode: Callable[[Sent], Message]
    ) -> _GrpcStream[Sent, Received]:
        """Sends the first message of a call."""
        stream = cls(call, decode, encode)
        try:
            await stream._write(first)
        except BaseException:
            stream.cancel()
            raise
        return stream


def _on_its_own(work: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
    """A task that nobody needs to wait for in the end."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


def _nothing(message: object) -> NoReturn:
    raise TypeError("this call sends one request only")


class _GrpcService:
    """A lazily opened channel: it belongs to the event loop that first uses it."""

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        self.address = address
        self._access = Access(address, credentials)
        self._opened: aio.Channel | None = None
        self._closed = False

    @property
    def _channel(self) -> aio.Channel:
        if self._closed:
            raise UnavailableError("the client is closed", reason=CLOSED)
        if self._opened is None:
            spread = _SPREAD if names_several(self.address) else ()
            self._opened = self._access.channel((*_OPTIONS, *spread))
        return self._opened

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...] | None:
        """What the service wants to know of the caller; health asks for nothing."""
        return self._access.metadata()

    def _call(self, method: str, request: RequestContext | None, make: Callable[[_Metadata | None], Made]) -> Made:
        """Makes a call of a generation, given its metadata; the service and the generation's trace are told whose."""
        metadata = self._metadata  # may raise: before anything is begun
        if request is None:
            return make(metadata)
        call = request.call(method, self.address)
        made = make((*(metadata or ()), *call.metadata))
        call.follow(made)
        return made

    async def healthy(self, within: float | None = None) -> bool:
        # One fixed request and answer do not warrant a dependency on the health package.
        check = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check", request_serializer=bytes, response_deserializer=bytes
        )
        with _translated():
            return await check(b"", timeout=within) == _SERVING

    async def close(self) -> None:
        self._closed = True
        if self._opened is not None:
            await self._opened.close()


class GrpcTarget(_GrpcService):
    """A target service at an address such as "127.0.0.1:50051", or several that run the same: "dns:///target:50051"."""

    @property
    def _stub(self) -> target_pb2_grpc.TargetServiceAsyncStub:
        return target_pb2_grpc.TargetServiceStub(self._channel)

    async def info(self, within: float | None = None) -> ModelInfo:
        with _translated():
            request = target_pb2.TargetServiceGetModelInfoRequest()
            response = await self._stub.GetModelInfo(request, timeout=within, metadata=self._metadata)
            return wire.model_info(response.info)

    async def verify(self, start: Start, within: float | None = None) -> VerifyStream:
        first = wire.verify_request(start)
        stub = self._stub
        call = self._call(_VERIFY, start.request, lambda metadata: stub.Verify(timeout=within, metadata=metadata))
        stream = _GrpcStream[Block | Extend, Started | Verdict]
        return await stream.open(call, first, wire.verify_response, wire.verify_request)

    async def generate(self, start: Start, within: float | None = None) -> Receiver[Started | Committed]:
        stub, request = self._stub, wire.generate_request(start)
        call = self._call(
            _GENERATE, start.request, lambda metadata: stub.Generate(request, timeout=within, metadata=metadata)
        )
        return _GrpcStream[NoReturn, Started | Committed](call, wire.generate_response, _nothing)

    async def explain(self, question: Explain, within: float | None = None) -> tuple[PositionExplanation, ...]:
        request = wire.explain_request(question)
        with _translated():
            response = await self._stub.ExplainVerify(request, timeout=within, metadata=self._metadata)
            return wire.explain_response(response)

    async def tokenize(
        self, prompt: Prompt, within: float | None = None, *, continuation: bool = False
    ) -> tuple[int, ...]:
        request = wire.tokenize_request(prompt, continuation)
        with _translated():
            return tuple((await self._stub.Tokenize(request, timeout=within, metadata=self._metadata)).token_ids)

    async def detokenize(
        self, token_ids: tuple[int, ...], keep_special_tokens: bool, within: float | None = None
    ) -> str:
        request = wire.detokenize_request(token_ids, keep_special_tokens)
        with _translated():
            return (await self._stub.Detokenize(request, timeout=within, metadata=self._metadata)).text


class GrpcDraft(_GrpcService):
    """A draft service at an address such as "127.0.0.1:50052", or several: "dns:///draft:50052"."""

    @property
    def _stub(self) -> draft_pb2_grpc.DraftServiceAsyncStub:
        return draft_pb2_grpc.DraftServiceStub(self._channel)

    async def info(self, within: float | None = None) -> ModelInfo:
        with _translated():
            request = draft_pb2.DraftServiceGetModelInfoRequest()
            response = await self._stub.GetModelInfo(request, timeout=within, metadata=self._metadata)
            return wire.model_info(response.info)

    async def propose(self, start: DraftStart, within: float | None = None) -> ProposeStream:
        first = wire.propose_request(start)
        stub = self._stub
        call = self._call(_PROPOSE, start.request, lambda metadata: stub.Propose(timeout=within, metadata=metadata))
        stream = _GrpcStream[DraftAsk | DraftStart, DraftStarted | Proposal]
        return await stream.open(call, first, wire.propose_response, wire.propose_request)
