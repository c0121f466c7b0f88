"""The transports over gRPC."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar
from weakref import WeakSet

from google.protobuf.message import Message
from grpc import aio

from specpair import wire
from specpair.addresses import names_several
from specpair.credentials import Access, Credentials
from specpair.errors import UnavailableError
from specpair.grpc_streams import GrpcStream, translated
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
from specpair.transports import CLOSED, ProposeStream, Receiver, VerifyStream
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

Made = TypeVar("Made", bound=aio.Call)
Opened = TypeVar("Opened", bound=GrpcStream[Any, Any])
_Metadata = tuple[tuple[str, str], ...]


def _nothing(message: object) -> NoReturn:
    raise TypeError("this call sends one request only")


class _GrpcService:
    """A lazily opened channel: it belongs to the event loop that first uses it."""

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        self.address = address
        self._access = Access(address, credentials)
        self._opened: aio.Channel | None = None
        self._streams = WeakSet[GrpcStream[Any, Any]]()
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
        with translated():
            return await check(b"", timeout=within) == _SERVING

    def _stream(self, stream: Opened) -> Opened:
        """A stream of this service, which ends with it."""
        self._streams.add(stream)
        return stream

    async def _begun(self, stream: Opened, first: Message) -> Opened:
        """The same, once it has sent its first message."""
        await self._stream(stream).begin(first)
        return stream

    async def close(self) -> None:
        self._closed = True
        # Not left to gRPC: what waits for a connection would wait on, and what is ended by it says otherwise.
        for stream in tuple(self._streams):
            stream.cancel()
        if self._opened is not None:
            await self._opened.close()


class GrpcTarget(_GrpcService):
    """A target service at an address such as "127.0.0.1:50051", or several that run the same: "dns:///target:50051"."""

    @property
    def _stub(self) -> target_pb2_grpc.TargetServiceAsyncStub:
        return target_pb2_grpc.TargetServiceStub(self._channel)

    async def info(self, within: float | None = None) -> ModelInfo:
        with translated():
            request = target_pb2.TargetServiceGetModelInfoRequest()
            response = await self._stub.GetModelInfo(request, timeout=within, metadata=self._metadata)
            return wire.model_info(response.info)

    async def verify(self, start: Start, within: float | None = None) -> VerifyStream:
        stub, first = self._stub, wire.verify_request(start)
        stream = GrpcStream[Block | Extend, Started | Verdict](
            self._call(_VERIFY, start.request, lambda metadata: stub.Verify(timeout=within, metadata=metadata)),
            wire.verify_response,
            wire.verify_request,
        )
        return await self._begun(stream, first)

    async def generate(self, start: Start, within: float | None = None) -> Receiver[Started | Committed]:
        stub, request = self._stub, wire.generate_request(start)
        stream = GrpcStream[NoReturn, Started | Committed](
            self._call(
                _GENERATE, start.request, lambda metadata: stub.Generate(request, timeout=within, metadata=metadata)
            ),
            wire.generate_response,
            _nothing,
        )
        return self._stream(stream)

    async def explain(self, question: Explain, within: float | None = None) -> tuple[PositionExplanation, ...]:
        request = wire.explain_request(question)
        with translated():
            response = await self._stub.ExplainVerify(request, timeout=within, metadata=self._metadata)
            return wire.explain_response(response)

    async def tokenize(
        self, prompt: Prompt, within: float | None = None, *, continuation: bool = False
    ) -> tuple[int, ...]:
        request = wire.tokenize_request(prompt, continuation)
        with translated():
            return tuple((await self._stub.Tokenize(request, timeout=within, metadata=self._metadata)).token_ids)

    async def detokenize(
        self, token_ids: tuple[int, ...], keep_special_tokens: bool, within: float | None = None
    ) -> str:
        request = wire.detokenize_request(token_ids, keep_special_tokens)
        with translated():
            return (await self._stub.Detokenize(request, timeout=within, metadata=self._metadata)).text


class GrpcDraft(_GrpcService):
    """A draft service at an address such as "127.0.0.1:50052", or several: "dns:///draft:50052"."""

    @property
    def _stub(self) -> draft_pb2_grpc.DraftServiceAsyncStub:
        return draft_pb2_grpc.DraftServiceStub(self._channel)

    async def info(self, within: float | None = None) -> ModelInfo:
        with translated():
            request = draft_pb2.DraftServiceGetModelInfoRequest()
            response = await self._stub.GetModelInfo(request, timeout=within, metadata=self._metadata)
            return wire.model_info(response.info)

    async def propose(self, start: DraftStart, within: float | None = None) -> ProposeStream:
        stub, first = self._stub, wire.propose_request(start)
        stream = GrpcStream[DraftAsk | DraftStart, DraftStarted | Proposal](
            self._call(_PROPOSE, start.request, lambda metadata: stub.Propose(timeout=within, metadata=metadata)),
            wire.propose_response,
            wire.propose_request,
        )
        return await self._begun(stream, first)
