"""The draft's engine: proposers on slots, and the one thread that computes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from specpair.errors import InvalidRequestError, UnsupportedError
from specpair.v1.common_pb2 import Source
from specpair_draft.config import DraftConfig
from specpair_draft.proposers import STEP_WIDTHS, ModelProposer, NgramProposer, Proposal, Proposer
from specpair_runtime.models.serving_model import ServingModel, load_serving_model
from specpair_runtime.serving import ServiceStatus
from specpair_runtime.slots import SlotPool

__all__ = ["Engine", "Timed"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timed:
    """What a proposer proposed, the time that it waited for the engine and the time that it took."""

    proposal: Proposal
    queue_us: int
    draft_us: int


class Engine:
    """Opens proposers and lets one thread work for them in order of arrival."""

    def __init__(self, config: DraftConfig, model: ServingModel | None) -> None:
        self.model = model
        self.pool = SlotPool(config.slots, config.queue)
        self._config = config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    @classmethod
    def load(cls, config: DraftConfig, status: ServiceStatus) -> Engine:
        """Loads the configured model, if any; blocks until it is warm. Raises ModelLoadError."""
        if config.proposer == "ngram":
            return cls(config, None)
        return cls(config, load_serving_model(config, STEP_WIDTHS, status))

    @property
    def sources(self) -> list[Source.ValueType]:
        """What this engine can propose with, first choice first."""
        return ([Source.SOURCE_MODEL] if self.model is not None else []) + [Source.SOURCE_NGRAM]

    @asynccontextmanager
    async def proposer(self, source: Source.ValueType, patience: float | None) -> AsyncIterator[Proposer]:
        """A proposer for one session; a model's holds a slot until the context ends.

        `patience` is the caller's time in seconds. Raises OverloadedError when no slot becomes free in it, and
        InvalidRequestError for a source that is not here.
        """
        source = source or self.sources[0]
        if source == Source.SOURCE_NGRAM:
            yield NgramProposer()
            return
        if source != Source.SOURCE_MODEL:
            raise UnsupportedError("not available", field="start.proposer")
        if self.model is None:
            raise InvalidRequestError("this service has no model", field="start.proposer")
        slot = await self.pool.acquire(min(patience or self._config.queue_timeout, self._config.queue_timeout))
        try:
            stop_ids = self.model.loaded.fingerprint.eos_token_ids
            yield ModelProposer(self.model.runner, slot, self._config.prefill_chunk, stop_ids)
        finally:
            # Work under way for this slot ends before the next owner's begins: one thread does both.
            self.pool.release(slot)

    async def prefill(self, proposer: Proposer) -> None:
        """Prepares a proposer for its first round."""
        await self._run(proposer.prefill)

    async def propose(self, proposer: Proposer, max_tokens: int) -> Timed:
        """One round of a proposer."""
        queued = time.perf_counter_ns()

        def work() -> Timed:
            began = time.perf_counter_ns()
            proposal = proposer.propose(max_tokens)
            return Timed(proposal, (began - queued) // 1000, (time.perf_counter_ns() - began) // 1000)

        return await self._run(work)

    def stop(self) -> None:
        """Stops the thread; blocks for the work under way."""
        self._thread.shutdown(cancel_futures=True)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
