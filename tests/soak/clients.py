"""Clients that ask without end, in every way that a caller may."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from specpair import DeadlineError, SpecpairError, SpeculativeClient, TokenStream

from .jobs import Job
from .tally import Tally

# Seconds for one generation: what takes longer counts as a loss.
_PATIENCE = 90.0
# Seconds before a client that was refused asks again, unless it was told when.
_PAUSE = 0.2

# Who proposes, and how far ahead of the verdicts.
KINDS = (("model", None), ("model", 0), ("model", 2), ("model", None), ("ngram", None), ("none", None))


@dataclass(frozen=True)
class Asker:
    """One client with its chances, its jobs and its books."""

    client: SpeculativeClient
    jobs: Sequence[Job]
    chance: random.Random
    tally: Tally
    speculates: bool

    async def ask_while(self, go_on: Callable[[], bool]) -> None:
        """Asks as long as that holds; what goes wrong is put down."""
        ways = [self._whole, self._slowly, self._left, self._cancelled, self._in_time, self._session]
        while go_on():
            job = self.chance.choice(self.jobs)
            [way] = self.chance.choices(ways, [8, 1, 2, 2, 2, 3])
            try:
                await way(job)
            except SpecpairError as error:
                self.tally.failed(error)
                await asyncio.sleep(error.retry_after or _PAUSE)
            except Exception as error:
                self.tally.failed(error)
                await asyncio.sleep(_PAUSE)

    async def _whole(self, job: Job) -> None:
        await self._first_turn(job, _PATIENCE)

    async def _slowly(self, job: Job) -> None:
        """As a reader that takes its time over every chunk."""
        await self._first_turn(job, _PATIENCE, lambda: asyncio.sleep(self.chance.uniform(0, 0.1)))

    async def _left(self, job: Job) -> None:
        """As a caller that has seen enough."""
        enough = self.chance.randrange(30)
        async with self.client.stream(job.turns[0], job.params, timeout=_PATIENCE) as stream:
            async for _ in stream:
                if len(stream.tokens) >= enough:
                    break
        self.tally.counts["left"] += 1
        self._check(job, 0, stream)

    async def _cancelled(self, job: Job) -> None:
        """As a caller whose task is cancelled at any moment."""
        task = asyncio.create_task(self._first_turn(job, _PATIENCE))
        await asyncio.wait([task], timeout=self.chance.choice([0.0, 0.01, 0.1, 0.5]))
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            self.tally.counts["cancelled"] += 1

    async def _in_time(self, job: Job) -> None:
        """As a caller with a deadline, which may be too short."""
        try:
            await self._first_turn(job, self.chance.choice([0.05, 0.3, 1.0, 5.0]))
        except DeadlineError:
            self.tally.counts["out_of_time"] += 1

    async def _session(self, job: Job) -> None:
        """All turns of a job on one session.

        A later turn that was resumed computes what was generated before it as a prompt, in other blocks, which in bf16
        may round otherwise: it is counted and not compared.
        """
        if not self.speculates:
            await self._whole(job)
            return
        async with self.client.session() as session:
            for turn, prompt in enumerate(job.turns):
                async with session.stream(prompt, job.params, timeout=_PATIENCE) as stream:
                    await self._read(stream)
                self.tally.finished(stream.result)
                if turn and stream.stats.resumes:
                    self.tally.counts["resumed_later_turns"] += 1
                    return
                self._check(job, turn, stream, whole=True)

    async def _first_turn(self, job: Job, within: float, pause: Callable[[], Awaitable[None]] | None = None) -> None:
        async with self.client.stream(job.turns[0], job.params, timeout=within) as stream:
            try:
                await self._read(stream, pause)
            finally:
                self._check(job, 0, stream)
        self.tally.finished(stream.result)
        self._check(job, 0, stream, whole=True)

    async def _read(self, stream: TokenStream, pause: Callable[[], Awaitable[None]] | None = None) -> None:
        before = time.perf_counter()
        async for chunk in stream:
            if chunk.tokens:
                self.tally.per_token.add((time.perf_counter() - before) / len(chunk.tokens), len(chunk.tokens))
            if pause is not None:
                await pause()
            before = time.perf_counter()

    def _check(self, job: Job, turn: int, stream: TokenStream, *, whole: bool = False) -> None:
        """What came so far is the beginning of what has to come, or all of it."""
        if job.expected is None:
            return
        got, expected = tuple(token.id for token in stream.tokens), job.expected[turn]
        self.tally.counts["compared"] += whole
        if got != (expected if whole else expected[: len(got)]):
            self.tally.differs(f"turn {turn} of {job.turns!r:.60}, resumed {stream.stats.resumes}: {got} != {expected}")


async def ask_all(
    target: str, draft: str, count: int, known: Sequence[Job], tally: Tally, go_on: Callable[[], bool]
) -> None:
    """So many clients with a connection each, all at once, as long as that holds."""
    async with AsyncExitStack() as stack:
        askers = []
        for number in range(count):
            kind, chain = KINDS[number % len(KINDS)]
            client = SpeculativeClient(target, draft if kind == "model" else kind, chain=chain)
            await stack.enter_async_context(client)
            askers.append(Asker(client, known, random.Random(number), tally, kind != "none"))
        await asyncio.gather(*(asker.ask_while(go_on) for asker in askers))
