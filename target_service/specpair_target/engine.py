"""The target's engine: sessions, slots and the scheduler behind one small interface for the servicer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from uuid import uuid4

import structlog

from specpair.errors import InvalidRequestError, ProtocolError
from specpair_runtime.engine_metrics import EngineMetrics
from specpair_runtime.models.output_identity import output_identity
from specpair_runtime.models.profiling import profiler_of
from specpair_runtime.models.ranks import Ranks
from specpair_runtime.models.runner import ModelRunner
from specpair_runtime.models.serving_model import ServingModel, follow_serving_model, load_serving_model
from specpair_runtime.sampling.rejection import SparseProbs
from specpair_runtime.serving import Caller, ServiceStatus
from specpair_runtime.slots import SlotPool
from specpair_target.blocks import Answer, Block, Stale, Verification
from specpair_target.config import TargetConfig
from specpair_target.prompts import Prompt
from specpair_target.scheduler import Scheduler
from specpair_target.sessions import Session, TurnOptions
from specpair_target.text import TextStream
from specpair_target.verifier import Verifier
from specpair_target.width import CANDIDATES, best_width, expected_tokens, step_costs

__all__ = ["Engine"]


class Engine:
    """Opens sessions and verifies their blocks. Its coroutines run on one event loop, the model in its own thread."""

    def __init__(
        self,
        model: ServingModel,
        config: TargetConfig,
        on_failure: Callable[[str], None] = lambda reason: None,
        metrics: EngineMetrics | None = None,
    ) -> None:
        metrics = metrics or EngineMetrics()
        self.model = model
        (self.width,) = model.widths
        chunk = config.chunk_on(model.runner.device.type)
        self.identity = output_identity(model, config, width=self.width, chunk=chunk)
        self.max_length = model.runner.max_length
        self.pool = SlotPool(
            config.slots, config.queue, config.queue_timeout, config.sessions_per_client, metrics.waited
        )
        metrics.watch(self.pool, queue=config.queue, recompilations=lambda: model.recompilations.count)
        self._scheduler = Scheduler(
            Verifier(model.runner, self.width),
            prefill_chunk=chunk,
            step_tokens=config.step_tokens or None,
            gather=config.gather,
            on_failure=on_failure,
            profiler=profiler_of(config, "target"),
            metrics=metrics,
        )
        self._scheduler.start()

    @classmethod
    def load(
        cls,
        config: TargetConfig,
        status: ServiceStatus,
        ranks: Ranks | None = None,
        metrics: EngineMetrics | None = None,
    ) -> Engine:
        """Loads the configured model, alone or with the `ranks` that this process leads; blocks until it is warm.

        Raises ModelLoadError.
        """
        widths, choose = _widths(config), None
        if config.verify_width == "auto":

            def choose(runner: ModelRunner) -> list[int]:
                return [_measured_width(runner, widths, config.expected_acceptance)]

        return cls(load_serving_model(config, widths, status, choose, ranks), config, status.fail, metrics)

    @staticmethod
    def follow(config: TargetConfig, ranks: Ranks) -> None:
        """Computes along in a process that does not lead, until it is dismissed. Raises ModelLoadError."""
        follow_serving_model(config, _widths(config), ranks)

    async def open(
        self,
        prompt: Prompt,
        committed: Sequence[int],
        options: TurnOptions,
        *,
        committed_field: str,
        caller: Caller | None = None,
    ) -> Session:
        """A session on a slot of its own, prefilling.

        Raises OverloadedError when there is no slot for the caller, and InvalidRequestError naming `committed_field`
        when the committed tokens already end the turn.
        """
        session = Session(
            id=uuid4().hex,
            tokens=list(prompt.token_ids),
            prompt_length=len(prompt.token_ids),
            max_length=self.max_length,
            options=options,
            text=self._text(prompt, options),
            messages=prompt.messages,
        )
        # Thousands of tokens may have been committed before, each of which is decoded.
        await asyncio.to_thread(session.commit, committed)
        if session.finish_reason:
            raise InvalidRequestError("the committed tokens already end the turn", field=committed_field)
        session.slot = await self.pool.acquire(caller)
        # From here on nothing is awaited before the caller has the session, so no cancellation can lose its slot.
        try:
            self._scheduler.prefill(session)
        except BaseException:
            self.pool.release(session.slot)
            raise
        return session

    def extend(self, session: Session, prompt: Prompt, options: TurnOptions) -> int:
        """Starts a session's next turn; returns how many tokens of its prompt the slot already holds."""
        kept = session.begin_turn(prompt.token_ids, options, self._text(prompt, options))
        session.messages = prompt.messages
        self._scheduler.prefill(session)
        return kept

    def _text(self, prompt: Prompt, options: TurnOptions) -> TextStream | None:
        tokenizer = self.model.loaded.tokenizer
        return TextStream(tokenizer, prompt.token_ids, options.stop_strings) if tokenizer is not None else None

    def submit(self, session: Session, block: Block) -> asyncio.Future[Answer]:
        """Queues a block behind the session's others; the answer fails with InternalError, OverloadedError or
        UnavailableError. Raises UnavailableError when the engine stops.
        """
        return asyncio.wrap_future(self._scheduler.submit(session, block))

    async def verify(
        self, session: Session, proposal: Sequence[int], draft_probs: Sequence[SparseProbs] = ()
    ) -> Verification:
        """Applies a proposal to the session as it is. Raises InternalError, OverloadedError or UnavailableError, and
        ProtocolError when the turn has ended.
        """
        answer = await self.submit(session, Block(proposal, draft_probs=draft_probs))
        if isinstance(answer, Stale):
            raise ProtocolError("the turn has ended", field="block")
        return answer

    def close(self, session: Session) -> None:
        """Ends a session and frees its slot; a second call does nothing."""
        if not session.closed:
            self._scheduler.close(session)
            self.pool.release(session.slot)

    def stop(self) -> None:
        """Stops the engine thread; blocks for the length of a step."""
        self._scheduler.stop()


def _widths(config: TargetConfig) -> list[int]:
    if config.verify_width != "auto":
        return [config.verify_width]
    # Narrower steps in fp32 may round otherwise as soon as two sessions share one.
    return [width for width in CANDIDATES if width >= 4 or config.dtype != "fp32"]


def _measured_width(runner: ModelRunner, widths: Sequence[int], acceptance: float) -> int:
    costs = step_costs(runner, widths)
    width = best_width(costs, acceptance)
    structlog.get_logger("specpair.engine").info(
        "verify width chosen",
        width=width,
        expected_acceptance=acceptance,
        step_ms={width: round(cost, 2) for width, cost in costs.items()},
        expected_tokens={width: round(expected_tokens(width, acceptance), 2) for width in costs},
    )
    return width
