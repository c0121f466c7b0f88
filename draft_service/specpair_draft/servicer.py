"""The draft service on gRPC."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator
from typing import Any

import grpc

from specpair.errors import ProtocolError, SpecpairError, UnavailableError
from specpair.v1 import common_pb2, draft_pb2, draft_pb2_grpc
from specpair_draft import wire
from specpair_draft.asks import Ask, Timed, Turn
from specpair_draft.config import DraftConfig
from specpair_draft.engine import Engine
from specpair_draft.metrics import DraftMetrics
from specpair_draft.proposers import Proposer
from specpair_runtime.models.serving_model import ServingModel
from specpair_runtime.serving import Attended, Caller, ServiceStatus, annotate, annotate_at_end
from specpair_runtime.wire import describe_model, fingerprint_message

__all__ = ["DraftServicer"]

_Context = grpc.aio.ServicerContext[Any, Any]


class DraftServicer(draft_pb2_grpc.DraftServiceServicer):
    """Answers the calls of `DraftService`; the engine comes later than the servicer, which is there from the start."""

    def __init__(self, config: DraftConfig, status: ServiceStatus, metrics: DraftMetrics | None = None) -> None:
        self._config = config
        self._metrics = metrics or DraftMetrics()
        self._status = status
        self._engine: Engine | None = None

    def load(self, status: ServiceStatus) -> None:
        """Loads the model, if any; blocks. Raises ModelLoadError."""
        self._engine = Engine.load(self._config, status, self._metrics)

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
        attended = Attended(aiter(requests), self._config.idle_timeout)
        first = await anext(attended, None)
        if first is None:
            return
        if first.WhichOneof("message") != "start":
            raise ProtocolError("the first message must be start", field="message")
        vocabulary = engine.model.runner.vocabulary if engine.model is not None else None
        turn = wire.read_turn(first.start, vocabulary)
        async with engine.proposer(first.start.proposer, Caller.of(context)) as proposer:
            annotate(session_id=first.start.session_id, source=common_pb2.Source.Name(proposer.source))
            stream = _Stream(proposer, engine.model, self._metrics)
            annotate_at_end(stream.fields)
            reading = asyncio.create_task(stream.read(turn, attended))
            try:
                while (response := await stream.next()) is not None:
                    yield response
                    stream.sent(response)
                    attended.answered(stream.answered)
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)


class _Stream:
    """A session's requests and responses. Requests are read while proposals are sent: a further ask ends the last one.

    A request is not looked at before the first answer to the one before it has been sent, so that a client cannot make
    answers pile up that it does not read.
    """

    def __init__(self, proposer: Proposer, model: ServingModel | None, metrics: DraftMetrics | None = None) -> None:
        self._proposer = proposer
        self._metrics = metrics or DraftMetrics()
        self._vocabulary = model.runner.vocabulary if model is not None else None
        self._fingerprint = fingerprint_message(model) if model is not None else None
        self._answers: asyncio.Queue[draft_pb2.ProposeResponse | Exception | None] = asyncio.Queue()
        self._answered = asyncio.Event()
        # The ask that is being answered, and how many of its proposals are still to come.
        self._ask: Ask | None = None
        self._owed = 0
        self._ended = False
        self._messages = self._turns = self._rounds = self._proposed = 0

    @property
    def answered(self) -> int:
        """How many of the stream's messages have all their answers; a further one ends those of the one before it."""
        return self._messages if not self._owed else self._messages - 1

    def fields(self) -> dict[str, int]:
        """Of the call's log line, as docs/logging.md describes them."""
        return {"turns": self._turns, "rounds": self._rounds, "proposed": self._proposed}

    async def read(self, turn: Turn, requests: AsyncIterator[draft_pb2.ProposeRequest]) -> None:
        """Begins a turn and takes the requests behind its start, to their end or to one that is bad."""
        try:
            self._begin(turn)
            await self._proposer.settled()
            async for request in requests:
                await self._answered.wait()
                self._answered.clear()
                if request.WhichOneof("message") == "start":
                    self._begin(wire.read_turn(request.start, self._vocabulary))
                    await self._proposer.settled()
                else:
                    self._take(request.ask.round, wire.read_ask(request, self._proposer.length, self._vocabulary))
        except Exception as error:
            self._answers.put_nowait(error)
            return
        self._ended = True
        if not self._owed:
            self._answers.put_nowait(None)

    async def next(self) -> draft_pb2.ProposeResponse | None:
        """The next response, None behind the last one; raises what went wrong."""
        answer = await self._answers.get()
        if isinstance(answer, Exception):
            raise answer
        if answer is not None and answer.HasField("proposal"):
            self._rounds += answer.proposal.index == 0
            self._proposed += len(answer.proposal.token_ids)
            said = answer.proposal
            self._metrics.proposed(said.source, len(said.token_ids), said.queue_us, said.draft_us)
        return answer

    def sent(self, response: draft_pb2.ProposeResponse) -> None:
        """A response has been sent."""
        if response.proposal.index == 0:
            self._answered.set()

    def _begin(self, turn: Turn) -> None:
        """Starts a turn; its prefill goes on behind the answer."""
        self._ask, self._owed = None, 0
        self._messages += 1
        self._turns += 1
        self._proposer.begin(turn)
        started = draft_pb2.ProposeStarted(
            proposer=self._proposer.source, max_length=self._proposer.max_length, fingerprint=self._fingerprint
        )
        self._answers.put_nowait(draft_pb2.ProposeResponse(started=started))

    def _take(self, round_: int, ask: Ask) -> None:
        def deliver(answer: Timed | SpecpairError) -> None:
            # What was on its way when another ask came is of no use any more.
            if self._ask is not ask:
                return
            if isinstance(answer, SpecpairError):
                self._answers.put_nowait(answer)
                return
            self._answers.put_nowait(wire.proposal_message(round_, self._proposer.source, answer))
            self._owed -= 1
            if self._ended and not self._owed:
                self._answers.put_nowait(None)

        self._ask, self._owed = ask, ask.proposals
        self._messages += 1
        self._proposer.ask(ask, deliver)
