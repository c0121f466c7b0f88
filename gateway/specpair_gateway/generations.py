"""The generations of one request, side by side."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from specpair import Chunk, Prediction, Prompt, Result, SamplingParams, SpeculativeClient, TokenStream

__all__ = ["Generations", "Job"]


@dataclass(frozen=True, slots=True)
class Job:
    """One generation: one choice of the answer."""

    prompt: Prompt
    params: SamplingParams
    prediction: Prediction | None = None


class Generations:
    """Runs jobs at once, each in a session of its own, and iterates over (number of the job, its next chunk).

        async with Generations(client, jobs, timeout, request_id) as running:
            async for index, chunk in running: ...

    Iterating raises what the first failing job raises. A job is at most one chunk ahead of whoever iterates. Leaving
    the block ends all of them. A deadline is common to all, and so is the id by which the services' logs have them.
    """

    def __init__(
        self, client: SpeculativeClient, jobs: tuple[Job, ...], timeout: float | None, request_id: str
    ) -> None:
        self._streams = [
            client.stream(job.prompt, job.params, prediction=job.prediction, timeout=timeout, request_id=request_id)
            for job in jobs
        ]
        self._ready: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue(maxsize=1)
        self._tasks: list[asyncio.Task[None]] = []
        self._running = len(jobs)

    @property
    def results(self) -> list[Result]:
        """One for each job. Raises RuntimeError before the end of all."""
        return [stream.result for stream in self._streams]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Chunk]:
        while self._running:
            index, found = await self._ready.get()
            if isinstance(found, Exception):
                raise found
            if found is not None:
                return index, found
            self._running -= 1
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run(index, stream)) for index, stream in enumerate(self._streams)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, index: int, stream: TokenStream) -> None:
        # A stream is closed by the task that iterates it.
        try:
            async with stream:
                async for chunk in stream:
                    await self._ready.put((index, chunk))
        except Exception as error:
            await self._ready.put((index, error))
        else:
            await self._ready.put((index, None))
