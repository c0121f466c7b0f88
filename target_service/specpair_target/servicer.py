"""The target service on gRPC."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import grpc

from specpair.errors import ProtocolError, UnavailableError, UnsupportedError
from specpair.v1 import common_pb2, target_pb2, target_pb2_grpc
from specpair_runtime.models.ranks import Ranks
from specpair_runtime.serving import Attended, Caller, ServiceStatus, annotate, annotate_at_end, stage
from specpair_runtime.wire import describe_model, read_sampling
from specpair_target import wire
from specpair_target.blocks import Answer, Block, Verification
from specpair_target.config import TargetConfig
from specpair_target.engine import Engine
from specpair_target.explain import explain
from specpair_target.metrics import StreamMetrics, VerifyMetrics
from specpair_target.prompts import Prompts
from specpair_target.reading import read_ahead
from specpair_target.sessions import Session, TurnOptions
from specpair_target.tally import Tally

__all__ = ["TargetServicer"]

_Context = grpc.aio.ServicerContext[Any, Any]

# Blocks of a stream that are read and not answered yet.
_MOST_UNANSWERED = 32


class TargetServicer(target_pb2_grpc.TargetServiceServicer):
    """Answers the calls of `TargetService`; the engine comes later than the servicer, which is there from the start."""

    def __init__(
        self,
        config: TargetConfig,
        status: ServiceStatus,
        ranks: Ranks | None = None,
        metrics: VerifyMetrics | None = None,
    ) -> None:
        """`ranks` are the processes that share the model, of which this one leads; None: it is alone."""
        self._config = config
        self._ranks = ranks
        self._metrics = metrics or VerifyMetrics()
        self._status = status
        self._engine: Engine | None = None

    def load(self, status: ServiceStatus) -> None:
        """Loads the model; blocks. Raises ModelLoadError."""
        self._engine = Engine.load(self._config, status, self._ranks, self._metrics.engine)

    def stop(self) -> None:
        """Stops the engine, if there is one; blocks."""
        if self._engine is not None:
            self._engine.stop()

    async def GetModelInfo(  # noqa: N802
        self, request: target_pb2.TargetServiceGetModelInfoRequest, context: _Context
    ) -> target_pb2.TargetServiceGetModelInfoResponse:
        """Describes the model and the service's phase."""
        info = common_pb2.ModelInfo(
            model=self._config.model,
            dtype=self._config.dtype,
            quantization=self._config.quantization,
            slots=self._config.slots,
            version=importlib.metadata.version("specpair"),
        )
        if self._config.verify_width != "auto":
            info.verify_width = self._config.verify_width
        self._status.fill(info)
        if self._engine is not None:
            describe_model(info, self._engine.model)
            info.verify_width = self._engine.width
            info.identity = self._engine.identity
            info.slots_in_use = self._engine.pool.in_use
        return target_pb2.TargetServiceGetModelInfoResponse(info=info)

    async def Verify(  # noqa: N802
        self, requests: AsyncIterator[target_pb2.VerifyRequest], context: _Context
    ) -> AsyncIterator[target_pb2.VerifyResponse]:
        """A session: verdicts for blocks, on one slot, until the stream ends."""
        engine = self._ready()
        attended = Attended(aiter(requests), self._config.idle_timeout)
        first = await anext(attended, None)
        if first is None:
            return
        if first.WhichOneof("message") != "start":
            raise ProtocolError("the first message must be start", field="message")
        async with self._session(engine, first.start, "start.", context) as (session, started):
            yield target_pb2.VerifyResponse(started=started)
            answered, tally = 1, Tally()
            annotate_at_end(tally.fields)
            attended.answered(answered)
            metrics = StreamMetrics(self._metrics)
            submit = partial(self._submit, engine, session, metrics)
            async with aclosing(read_ahead(attended, submit, _MOST_UNANSWERED)) as messages:
                async for request, pending in messages:
                    if pending is None:
                        yield target_pb2.VerifyResponse(started=await self._extend(engine, session, request.extend))
                        tally.turn()
                    else:
                        for behind, verification in enumerate(pending):
                            judged = await verification
                            answer = wire.verdict(request.block.round + behind, judged, engine.pool.in_use)
                            metrics.answered(
                                request.block.source, len(request.block.token_ids), answer.accepted, judged
                            )
                            tally.answered(len(request.block.token_ids), judged)
                            yield target_pb2.VerifyResponse(verdict=answer)
                    answered += 1
                    attended.answered(answered)

    async def Generate(  # noqa: N802
        self, request: target_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[target_pb2.GenerateResponse]:
        """Plain decoding: the steps of a session whose blocks are empty."""
        engine = self._ready()
        async with self._session(engine, request, "", context) as (session, started):
            yield target_pb2.GenerateResponse(started=started)
            tally = Tally()
            annotate_at_end(tally.fields)
            # The next step runs while this one's token is on its way.
            pending = deque(engine.submit(session, Block()) for _ in range(2))
            try:
                while isinstance(answer := await pending.popleft(), Verification):
                    pending.append(engine.submit(session, Block()))
                    self._metrics.generated.inc(len(answer.commit.token_ids))
                    tally.answered(0, answer)
                    committed = wire.committed_message(answer.commit)
                    yield target_pb2.GenerateResponse(committed=committed, base_length=answer.base_length)
            finally:
                for left in pending:
                    left.cancel()

    async def Tokenize(  # noqa: N802
        self, request: target_pb2.TokenizeRequest, context: _Context
    ) -> target_pb2.TokenizeResponse:
        """The ids of a prompt as Verify and Generate would take it."""
        engine = self._ready()
        prompt = await asyncio.to_thread(
            wire.read_prompt,
            request.prompt,
            self._prompts(engine),
            self._limits(engine),
            "prompt",
            continuation=request.continuation,
        )
        return target_pb2.TokenizeResponse(token_ids=prompt.token_ids)

    async def Detokenize(  # noqa: N802
        self, request: target_pb2.DetokenizeRequest, context: _Context
    ) -> target_pb2.DetokenizeResponse:
        """The text of token ids."""
        engine = self._ready()
        tokenizer = engine.model.loaded.tokenizer
        if tokenizer is None:
            raise UnsupportedError("this model has no tokenizer", field="token_ids")
        wire.check_detokenizable(request.token_ids, self._limits(engine))
        text = await asyncio.to_thread(
            tokenizer.decode,
            list(request.token_ids),
            skip_special_tokens=not request.keep_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return target_pb2.DetokenizeResponse(text=text)

    async def ExplainVerify(  # noqa: N802
        self, request: target_pb2.ExplainVerifyRequest, context: _Context
    ) -> target_pb2.ExplainVerifyResponse:
        """Judges one proposal on a slot of its own and says why."""
        engine = self._ready()
        limits = self._limits(engine)
        caller = Caller.of(context)
        engine.pool.check(caller)
        wire.check_proposal(request.token_ids, limits, "token_ids")
        sampling = read_sampling(request.sampling, limits.vocabulary, "sampling")
        draft_probs = wire.read_draft_probs(request, sampling, limits, "")
        prompt = await asyncio.to_thread(wire.read_prompt, request.prompt, self._prompts(engine), limits, "prompt")
        options = TurnOptions(sampling=sampling, stop_token_ids=limits.eos_token_ids, traced=True)
        session = await engine.open(prompt, (), options, committed_field="", caller=caller)
        try:
            verification = await engine.verify(session, request.token_ids, draft_probs)
        finally:
            engine.close(session)
        explained = explain(verification.base_length, request.token_ids, draft_probs, sampling, verification.judgement)
        return target_pb2.ExplainVerifyResponse(positions=[wire.explanation(position) for position in explained])

    async def _extend(
        self, engine: Engine, session: Session, request: target_pb2.SessionExtend
    ) -> target_pb2.SessionStarted:
        """Starts a session's next turn."""
        if not session.finish_reason:
            raise ProtocolError("the turn has not ended", field="extend")
        limits, prompts = self._limits(engine), self._prompts(engine)
        options = wire.read_turn(request, limits, text=prompts.tokenizer is not None, prefix="extend.")
        prompt = await asyncio.to_thread(wire.read_prompt, request.prompt, prompts, limits, "extend.prompt", session)
        kept = engine.extend(session, prompt, options)
        annotate(prompt_tokens=len(prompt.token_ids), cached_tokens=kept)
        self._metrics.began(prompt_tokens=len(prompt.token_ids), cached_tokens=kept)
        return wire.started(session, limits, kept, engine.identity)

    def _submit(
        self, engine: Engine, session: Session, metrics: StreamMetrics, request: target_pb2.VerifyRequest
    ) -> list[asyncio.Future[Answer]] | None:
        """Hands blocks to the engine, where they wait for the verdicts before; None for the next turn's prompt."""
        kind = request.WhichOneof("message")
        if kind == "extend":
            return None
        if kind != "block":
            raise ProtocolError(f"expected a block, got {kind or 'an empty message'}", field=kind or "message")
        blocks = wire.read_blocks(request.block, session.options.sampling, self._limits(engine))
        metrics.submitted(len(blocks))
        return [engine.submit(session, block) for block in blocks]

    def _ready(self) -> Engine:
        if self._engine is None:
            raise UnavailableError("the model is not loaded yet", reason="NOT_READY")
        return self._engine

    def _prompts(self, engine: Engine) -> Prompts:
        return Prompts(engine.model.loaded.tokenizer, engine.max_length, engine.model.runner.vocabulary)

    def _limits(self, engine: Engine) -> wire.Limits:
        fingerprint = engine.model.loaded.fingerprint
        return wire.Limits(
            vocabulary=fingerprint.vocabulary_size,
            max_length=engine.max_length,
            block=engine.width - 1,
            eos_token_ids=frozenset(fingerprint.eos_token_ids),
        )

    @asynccontextmanager
    async def _session(
        self,
        engine: Engine,
        request: target_pb2.SessionStart | target_pb2.GenerateRequest,
        prefix: str,
        context: _Context,
    ) -> AsyncIterator[tuple[Session, target_pb2.SessionStarted]]:
        """Opens the session that a request describes; frees its slot whatever ends the call."""
        caller = Caller.of(context)
        # Nothing is tokenized for a session that will be refused.
        engine.pool.check(caller)
        limits, prompts = self._limits(engine), self._prompts(engine)
        options = wire.read_turn(request, limits, text=prompts.tokenizer is not None, prefix=prefix)
        prompt = await asyncio.to_thread(wire.read_prompt, request.prompt, prompts, limits, f"{prefix}prompt")
        committed_field = f"{prefix}committed_token_ids"
        committed = wire.read_committed(request.committed_token_ids, len(prompt.token_ids), limits, committed_field)
        session = await engine.open(prompt, committed, options, committed_field=committed_field, caller=caller)
        try:
            annotate(session_id=session.id, slot=session.slot, prompt_tokens=len(prompt.token_ids))
            annotate(cached_tokens=0, committed_tokens=len(committed))
            stage("prefill", session.prefill)
            self._metrics.began(prompt_tokens=len(prompt.token_ids), committed_tokens=len(committed))
            yield session, wire.started(session, limits, 0, engine.identity)
        finally:
            engine.close(session)
