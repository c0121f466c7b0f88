"""One generation: drives the law of `loop` over the transports. Nothing here outlives its generator."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from specpair.errors import ProtocolError, SpecpairError
from specpair.loop import Loop
from specpair.messages import Start, Started, Verdict
from specpair.meter import Meter
from specpair.proposers import Proposer
from specpair.results import Chunk, Result, Stats
from specpair.transports import Receiver, TargetTransport, VerifyStream

__all__ = ["Plan", "Session"]

# Seconds that the services have to end a finished session's streams before they are cancelled.
_FAREWELL = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """How a session is going to speculate."""

    proposer: Callable[[Started], Proposer]
    """Makes the proposer, once the tokens of the prompt are known."""
    vocabulary_size: int | None = None
    """Ids from here on are not sent to the target; None if the proposer knows none of them."""


class Session:
    """One generation at a target. `within` limits its streams to so many seconds."""

    def __init__(self, target: TargetTransport, start: Start, *, meter: Meter, within: float | None = None) -> None:
        self.loop: Loop | None = None
        self._target = target
        self._start = start
        self._meter = meter
        self._within = within

    async def speculate(self, plan: Callable[[], Awaitable[Plan]]) -> AsyncGenerator[Chunk]:
        """Speculative decoding as planned; the plan is made first, so that its failure costs no slot.

        Yields one chunk per round that committed something. Raises what the transport raises, and ProtocolError if the
        target contradicts itself.
        """
        meter = self._meter
        planned = await plan()
        stream = await self._target.verify(self._start, self._within)
        async with _ended(stream) as streams:
            loop = self._open(await stream.receive(), planned.vocabulary_size)
            proposer = planned.proposer(self._started)
            streams.append(proposer)
            while loop.finish_reason is None:
                pacer = proposer.pacer
                ask = loop.propose(pacer.draft_length(loop.limit))
                meter.begin_round()
                proposal = await proposer.propose(ask) if ask.max_tokens else None
                meter.proposal(proposal)
                await stream.send(loop.verify(ask, proposal))
                verdict, chunk = await _judged(stream, loop)
                observed = meter.verdict(ask, verdict)
                if ask.round > 1:  # the first one includes the prefill of both sides
                    pacer.observe(observed)
                if not verdict.stale:
                    meter.tokens()
                    yield chunk

    async def follow(self) -> AsyncGenerator[Chunk]:
        """Plain decoding in the target's own loop. Yields one chunk per message; raises as `speculate` does."""
        receiver = await self._target.generate(self._start, self._within)
        async with _ended(receiver):
            loop = self._open(await receiver.receive(), None)
            while loop.finish_reason is None:
                committed = await receiver.receive()
                if isinstance(committed, Started):
                    raise ProtocolError("the target started twice")
                chunk = loop.append(committed)
                self._meter.tokens()
                yield chunk

    @property
    def stats(self) -> Stats:
        """Statistics so far."""
        return self._meter.stats(self.loop)

    @property
    def result(self) -> Result | None:
        """The result; None as long as the session has not finished."""
        loop = self.loop
        if loop is None or loop.finish_reason is None:
            return None
        return Result(
            text="".join(token.text for token in loop.tokens),
            tokens=tuple(loop.tokens),
            prompt_token_ids=self._started.prompt_token_ids,
            finish_reason=loop.finish_reason,
            stats=self.stats,
            stop_string=loop.stop_string,
        )

    @property
    def _started(self) -> Started:
        assert self._meter.started is not None
        return self._meter.started

    def _open(self, started: object, vocabulary_size: int | None) -> Loop:
        if not isinstance(started, Started):
            raise ProtocolError("the target's first message is not `started`")
        self._meter.started = started
        self.loop = Loop(started, self._start.params, vocabulary_size=vocabulary_size)
        return self.loop


async def _judged(stream: VerifyStream, loop: Loop) -> tuple[Verdict, Chunk]:
    """The verdict on the block that is on its way, and what it adds; duplicates of earlier ones are passed over."""
    while True:
        verdict = await stream.receive()
        if isinstance(verdict, Started):
            raise ProtocolError("the target started twice")
        chunk = loop.commit(verdict)
        if not loop.waiting:
            return verdict, chunk


@contextlib.asynccontextmanager
async def _ended(first: Receiver[Any]) -> AsyncIterator[list[Receiver[Any] | Proposer]]:
    """Ends the stream, and those appended, however the block ends: politely after its last line, else at once."""
    streams: list[Receiver[Any] | Proposer] = [first]
    try:
        yield streams
        # The tokens are complete: a failure from here on is nobody's loss.
        with contextlib.suppress(SpecpairError, TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                await asyncio.gather(*(stream.finish() for stream in streams))
    finally:
        for stream in streams:
            stream.cancel()
