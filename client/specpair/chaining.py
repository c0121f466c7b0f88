"""What goes on at once in a turn: the proposer is asked while the target judges."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

from specpair.depth import Depth
from specpair.errors import ProtocolError
from specpair.loop import Ask, Loop, Sent
from specpair.messages import Block, Proposal, Started, Verdict
from specpair.meter import Meter
from specpair.pacing import Round
from specpair.proposers import Proposer
from specpair.transports import VerifyStream

__all__ = ["Chain"]

# Plain steps in one message: one more for each so many that have gone before, up to the protocol's limit.
_STEPS_EACH, _MOST_STEPS = 8, 8


class Chain:
    """The blocks of one turn between proposer and target, `depth.blocks` of them ahead of the verdict.

    With no block under way nothing runs beside the turn. Else there are up to two tasks, one that asks and one that
    receives; they end with the `async with` block. An ask that no longer continues what there is to continue is given
    up, for which proposers and streams are made.
    """

    def __init__(self, stream: VerifyStream, loop: Loop, proposer: Proposer, meter: Meter, depth: Depth) -> None:
        self._stream = stream
        self._loop = loop
        self._proposer = proposer
        self._meter = meter
        self._depth = depth
        self._ask: Ask | None = None
        self._asking: asyncio.Task[Proposal] | None = None
        self._receiving: asyncio.Task[Started | Verdict] | None = None
        # Plain steps still to be sent, and sent since something was proposed.
        self._plain = self._stepped = 0
        self._judged = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _end(self._asking, self._receiving)

    @property
    def room(self) -> bool:
        """Whether another block may go out before the next verdict."""
        loop = self._loop
        if not loop.waiting:
            return loop.open
        judged = self._receiving is not None and self._receiving.done()
        return loop.open and not judged and loop.waiting <= self._depth.blocks

    @property
    def steady(self) -> bool:
        """Whether plain steps may go out before the next verdict, since nothing would be proposed for them."""
        return self._plain > 0 and self._loop.waiting <= self._depth.steps and self._loop.steady

    async def propose(self) -> tuple[Ask, Proposal] | None:
        """What the proposer says to continue with; None if a verdict came first, which may change the question."""
        loop = self._loop
        if self._ask is None or not loop.stands(self._ask):
            await _end(self._asking)
            self._meter.asking(loop.applied + loop.waiting + 1)
            self._ask, self._asking = loop.propose(ahead=self._depth.blocks), None
        if loop.waiting:
            self._asking = self._asking or asyncio.create_task(self._proposer.propose(self._ask))
            self._receiving = self._receiving or asyncio.create_task(self._stream.receive())
            await asyncio.wait((self._asking, self._receiving), return_when=asyncio.FIRST_COMPLETED)
            if self._receiving.done():
                return None
        proposal = await (self._asking or self._proposer.propose(self._ask))
        answered, self._ask, self._asking = (self._ask, proposal), None, None
        self._meter.answered(proposal)
        self._plain, self._stepped = proposal.plain, 0
        return answered

    async def step(self) -> None:
        """Sends plain steps to the target: the more at a time, the longer nothing has ended them."""
        loop = self._loop
        self._meter.asking(loop.applied + loop.waiting + 1)
        block = loop.steps(min(self._plain, 1 + self._stepped // _STEPS_EACH, _MOST_STEPS))
        self._plain -= 1 + block.more_steps
        self._stepped += 1 + block.more_steps
        await self.send(block)

    async def send(self, block: Block) -> None:
        """Sends a block to the target."""
        self._meter.sending(block, alone=self._loop.waiting == 1)
        await self._stream.send(block)

    async def verdict(self) -> Verdict:
        """The target's next verdict."""
        receiving, self._receiving = self._receiving, None
        message = await (self._stream.receive() if receiving is None else receiving)
        if isinstance(message, Started):
            raise ProtocolError("the target started twice")
        return message

    def learn(self, sent: Sent, verdict: Verdict) -> Round:
        """What the verdict on a block tells those who choose lengths; returns what the round amounts to."""
        round, trip = self._meter.verdict(sent, verdict)
        if self._plain and self._proposer.tempted(self._loop.token_ids, self._loop.limit):
            self._plain = 0
        self._judged += 1
        if self._judged > 1:  # the first round on a stream includes the prefill, in a turn of both sides
            self._proposer.observe(round)
            self._depth.observe(round, trip, sent.proposal.draft_us if sent.proposal is not None else 0)
        return round


async def _end(*tasks: asyncio.Task[Any] | None) -> None:
    """Ends tasks that nobody waits for any more: all of them, also if this is cancelled meanwhile."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
