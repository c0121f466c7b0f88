"""The draft's engine: proposers, slots and the threads that compute, behind one interface for the servicer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from specpair.errors import InvalidRequestError, UnsupportedError
from specpair.v1.common_pb2 import Source
from specpair_draft.config import DraftConfig
from specpair_draft.metrics import DraftMetrics
from specpair_draft.proposers import ModelProposer, NgramProposer, Proposer
from specpair_draft.scheduler import Scheduler
from specpair_draft.sessions import Session
from specpair_draft.steps import STEP_WIDTHS, Decoder
from specpair_runtime.models.profiling import profiler_of
from specpair_runtime.models.serving_model import ServingModel, load_serving_model
from specpair_runtime.serving import Caller, ServiceStatus, stage
from specpair_runtime.slots import SlotPool

__all__ = ["Engine"]

_MAX_LOOKUPS = 256


class Engine:
    """Opens proposers. One thread decodes for those with the model, another one looks up for the others."""

    def __init__(
        self,
        config: DraftConfig,
        model: ServingModel | None,
        on_failure: Callable[[str], None] = lambda reason: None,
        metrics: DraftMetrics | None = None,
    ) -> None:
        self.model = model
        metrics = metrics or DraftMetrics()
        self.pool = SlotPool(
            config.slots, config.queue, config.queue_timeout, config.sessions_per_client, metrics.engine.waited
        )
        # Prompt lookup needs no KV slot, but memory for its index and time of its thread.
        self._lookups = SlotPool(_MAX_LOOKUPS, config.queue, config.queue_timeout, config.sessions_per_client)
        metrics.watch_lookups(self._lookups)
        self._config = config
        self._lookup_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lookup")
        self._scheduler: Scheduler | None = None
        if model is not None:
            metrics.engine.watch(self.pool, queue=config.queue, recompilations=lambda: model.recompilations.count)
            self._scheduler = Scheduler(
                Decoder(model.runner),
                prefill_chunk=config.prefill_chunk,
                on_failure=on_failure,
                profiler=profiler_of(config, "draft"),
                metrics=metrics.engine,
            )
            self._scheduler.start()

    @classmethod
    def load(cls, config: DraftConfig, status: ServiceStatus, metrics: DraftMetrics | None = None) -> Engine:
        """Loads the configured model, if any; blocks until it is warm. Raises ModelLoadError."""
        model = None if config.proposer == "ngram" else load_serving_model(config, STEP_WIDTHS, status)
        return cls(config, model, status.fail, metrics)

    @property
    def sources(self) -> list[Source.ValueType]:
        """What this engine can propose with, first choice first."""
        return ([Source.SOURCE_MODEL] if self.model is not None else []) + [Source.SOURCE_NGRAM]

    @asynccontextmanager
    async def proposer(self, source: Source.ValueType, caller: Caller | None = None) -> AsyncIterator[Proposer]:
        """A proposer for one session; a model's holds a slot until the context ends.

        Raises OverloadedError when there is no slot for the caller, and InvalidRequestError for a source that is not
        here.
        """
        source = source or self.sources[0]
        if source == Source.SOURCE_NGRAM:
            async with _lent(self._lookups, caller):
                lookups = NgramProposer(self._lookup_thread)
                try:
                    yield lookups
                finally:
                    lookups.close()
            return
        if source != Source.SOURCE_MODEL:
            raise UnsupportedError("not available", field="start.proposer")
        if self.model is None or self._scheduler is None:
            raise InvalidRequestError("this service has no model", field="start.proposer")
        async with _lent(self.pool, caller) as slot:
            runner = self.model.runner
            session = Session(
                slot,
                runner.max_length,
                stop_ids=self.model.loaded.fingerprint.eos_token_ids,
                run_ahead=self._config.run_ahead,
            )
            stage("prefill", session.prefill)
            proposer = ModelProposer(self._scheduler, session, runner.max_length)
            try:
                yield proposer
            finally:
                proposer.close()

    def stop(self) -> None:
        """Stops the threads; blocks for the work under way."""
        if self._scheduler is not None:
            self._scheduler.stop()
        self._lookup_thread.shutdown(cancel_futures=True)


@asynccontextmanager
async def _lent(pool: SlotPool, caller: Caller | None) -> AsyncIterator[int]:
    slot = await pool.acquire(caller)
    try:
        yield slot
    finally:
        pool.release(slot)
