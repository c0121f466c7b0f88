"""The draft's engine: proposers on slots, and the one thread that computes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from specpair.errors import InvalidRequestError, UnsupportedError
from specpair.v1.common_pb2 import Source
from specpair_draft.config import DraftConfig
from specpair_draft.proposers import STEP_WIDTHS, ModelProposer, NgramProposer, Proposal, Proposer, Turn
from specpair_runtime.models.serving_model import ServingModel, load_serving_model
from specpair_runtime.serving import ServiceStatus
from specpair_runtime.slots import SlotPool

__all__ = ["Ask", "Engine", "Timed"]

Result = TypeVar("Result")

_MAX_LOOKUPS = 256


@dataclass(frozen=True)
class Ask:
    """One round: what the target committed from a position on, and how many ids to propose behind it."""

    from_position: int
    token_ids: Sequence[int]
    max_tokens: int


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
        self.pool = SlotPool(config.slots, config.queue, config.queue_timeout)
        # Prompt lookup needs no KV slot, but memory for its index and time of the engine.
        self._lookups = SlotPool(_MAX_LOOKUPS, config.queue, config.queue_timeout)
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
            async with _lent(self._lookups, patience):
                yield NgramProposer()
            return
        if source != Source.SOURCE_MODEL:
            raise UnsupportedError("not available", field="start.proposer")
        if self.model is None:
            raise InvalidRequestError("this service has no model", field="start.proposer")
        async with _lent(self.pool, patience) as slot:
            stop_ids = self.model.loaded.fingerprint.eos_token_ids
            # Work under way for this slot ends before the next owner's begins: one thread does both.
            yield ModelProposer(self.model.runner, slot, self._config.prefill_chunk, stop_ids)

    async def begin(self, proposer: Proposer, turn: Turn) -> None:
        """Starts a turn and prefills it; other sessions get the engine between two chunks."""
        await self._run(lambda: proposer.begin(turn))
        while await self._run(proposer.prefill_chunk):
            pass

    async def propose(self, proposer: Proposer, ask: Ask) -> Timed:
        """One round of a proposer."""
        queued = time.perf_counter_ns()

        def work() -> Timed:
            began = time.perf_counter_ns()
            proposer.follow(ask.from_position, ask.token_ids)
            proposal = proposer.propose(ask.max_tokens)
            return Timed(proposal, (began - queued) // 1000, (time.perf_counter_ns() - began) // 1000)

        return await self._run(work)

    def stop(self) -> None:
        """Stops the thread; blocks for the work under way."""
        self._thread.shutdown(cancel_futures=True)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


@asynccontextmanager
async def _lent(pool: SlotPool, patience: float | None) -> AsyncIterator[int]:
    slot = await pool.acquire(patience)
    try:
        yield slot
    finally:
        pool.release(slot)
