"""The draft service on gRPC."""

from __future__ import annotations

import importlib.metadata
from collections.abc import AsyncIterator
from typing import Any

import grpc

from specpair.errors import ProtocolError, UnavailableError
from specpair.v1 import common_pb2, draft_pb2, draft_pb2_grpc
from specpair_draft import wire
from specpair_draft.config import DraftConfig
from specpair_draft.engine import Engine
from specpair_draft.proposers import Proposer, Turn
from specpair_runtime.serving import ServiceStatus, annotate
from specpair_runtime.wire import describe_model

__all__ = ["DraftServicer"]

_Context = grpc.aio.ServicerContext[Any, Any]


class DraftServicer(draft_pb2_grpc.DraftServiceServicer):
    """Answers the calls of `DraftService`; the engine comes later than the servicer, which is there from the start."""

    def __init__(self, config: DraftConfig, status: ServiceStatus) -> None:
        self._config = config
        self._status = status
        self._engine: Engine | None = None

    def load(self, status: ServiceStatus) -> None:
        """Loads the model, if any; blocks. Raises ModelLoadError."""
        self._engine = Engine.load(self._config, status)

    def stop(self) -> None:
        """Stops the engine, if there is one; blocks."""
        if self._engine is not None:
            self._engine.stop()

    async def GetModelInfo(  # noqa: N802
        self, request: draft_pb2.DraftServiceGetModelInfoRequest, context: _Context
    ) -> draft_pb2.DraftServiceGetModelInfoResponse:
        """Describes the model, if any, and the service's phase."""
        info = common_pb2.ModelInfo(version=importlib.metadata.version("specpair"))
        if self._config.proposer == "model":
            info.model = self._config.model
            info.dtype = self._config.dtype
            info.quantization = self._config.quantization
            info.slots = self._config.slots
        self._status.fill(info)
        if self._engine is not None:
            info.proposers.extend(self._engine.sources)
            info.slots_in_use = self._engine.pool.in_use
            if self._engine.model is not None:
                describe_model(info, self._engine.model)
        return draft_pb2.DraftServiceGetModelInfoResponse(info=info)

    async def Propose(  # noqa: N802
        self, requests: AsyncIterator[draft_pb2.ProposeRequest], context: _Context
    ) -> AsyncIterator[draft_pb2.ProposeResponse]:
        """A session: proposals on one slot, until the stream ends."""
        engine = self._engine
        if engine is None:
            raise UnavailableError("the model is not loaded yet", reason="NOT_READY")
        first = await anext(aiter(requests), None)
        if first is None:
            return
        if first.WhichOneof("message") != "start":
            raise ProtocolError("the first message must be start", field="message")
        vocabulary = engine.model.runner.vocabulary if engine.model is not None else None
        turn = wire.read_turn(first.start, vocabulary)
        async with engine.proposer(first.start.proposer, context.time_remaining()) as proposer:
            annotate(session_id=first.start.session_id, source=common_pb2.Source.Name(proposer.source))
            yield await _begin(engine, proposer, turn)
            rounds = proposed = 0
            async for request in requests:
                if request.WhichOneof("message") == "start":
                    yield await _begin(engine, proposer, wire.read_turn(request.start, vocabulary))
                    continue
                ask = wire.read_ask(request, proposer.length, vocabulary)
                timed = await engine.propose(proposer, ask)
                rounds += 1
                proposed += len(timed.proposal.token_ids)
                annotate(rounds=rounds, proposed=proposed)
                yield wire.proposal_message(request.ask.round, proposer, timed)


async def _begin(engine: Engine, proposer: Proposer, turn: Turn) -> draft_pb2.ProposeResponse:
    """Starts a turn and prefills it: the first ask then finds the slot ready."""
    await engine.begin(proposer, turn)
    return draft_pb2.ProposeResponse(
        started=draft_pb2.ProposeStarted(proposer=proposer.source, max_length=proposer.max_length)
    )
