"""A session's proposer, as the event loop sees it: a small model on a KV slot of its own, or prompt lookup."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Protocol

import structlog

from specpair.errors import InternalError, SpecpairError
from specpair.ngram import NgramIndex
from specpair.v1.common_pb2 import Source
from specpair_draft.asks import Ask, Deliver, Proposal, Timed, Turn
from specpair_draft.scheduler import Scheduler
from specpair_draft.sessions import Session

__all__ = ["ModelProposer", "NgramProposer", "Proposer"]


class Proposer(Protocol):
    """One session's proposer. It follows the target's tokens and guesses on. Lives on one event loop."""

    source: Source.ValueType
    max_length: int
    """Positions of its KV cache; 0 for no limit."""
    length: int
    """Tokens that it follows now."""

    def begin(self, turn: Turn) -> None:
        """Starts a turn; ends what was asked before. Raises UnavailableError once the engine stops."""
        ...

    async def settled(self) -> None:
        """Waits until a further turn may begin: nobody can begin them faster than they are taken."""
        ...

    def ask(self, ask: Ask, deliver: Deliver) -> None:
        """Asks for proposals, which `deliver` gets on the event loop, or an error in place of the next one.

        A further ask ends this one. Raises UnavailableError once the engine stops.
        """
        ...


class ModelProposer:
    """Guesses with the model."""

    source: Source.ValueType = Source.SOURCE_MODEL

    def __init__(self, scheduler: Scheduler, session: Session, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._scheduler = scheduler
        self._session = session
        self._loop = asyncio.get_running_loop()

    def begin(self, turn: Turn) -> None:
        """Starts a turn; its prefill begins."""
        self._scheduler.begin(self._session, turn)
        self.length = len(turn.token_ids)

    async def settled(self) -> None:
        """At once: a turn that begins replaces the one before."""

    def ask(self, ask: Ask, deliver: Deliver) -> None:
        """Asks for proposals; see `Proposer`."""
        self._scheduler.ask(self._session, ask, _on_loop(self._loop, deliver))
        self.length = ask.base_length

    def close(self) -> None:
        """Ends the session; its slot may be given away."""
        self._scheduler.close(self._session)


class NgramProposer:
    """Prompt lookup over everything that the session has said, in a thread of its own kind: an index takes time."""

    source: Source.ValueType = Source.SOURCE_NGRAM
    max_length = 0

    def __init__(self, thread: Executor) -> None:
        """`thread` does one thing after another."""
        self.length = 0
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self._begun: Future[None] | None = None
        self._closed = False
        # The thread's own.
        self._tokens: list[int] = []
        self._index = NgramIndex()

    def begin(self, turn: Turn) -> None:
        """Starts a turn."""
        self._begun = self._thread.submit(self._follow, 0, turn.token_ids)
        self.length = len(turn.token_ids)

    async def settled(self) -> None:
        """Waits until the thread has taken the turn; until then nothing more is to be read."""
        if self._begun is not None:
            await asyncio.wrap_future(self._begun)

    def ask(self, ask: Ask, deliver: Deliver) -> None:
        """Looks up what followed the last occurrence of the longest n-gram at the end."""
        self._thread.submit(self._answer, ask, _on_loop(self._loop, deliver), time.perf_counter_ns())
        self.length = ask.base_length

    def close(self) -> None:
        """Ends the session: what is still queued is not done."""
        self._closed = True

    def _follow(self, from_position: int, token_ids: Sequence[int]) -> None:
        if self._closed:
            return
        if from_position < len(self._tokens):
            # The index only grows; what the target committed is not taken back but by a caller that starts again.
            self._index = NgramIndex(self._tokens[:from_position])
        self._tokens[from_position:] = token_ids
        self._index.extend(token_ids)

    def _answer(self, ask: Ask, deliver: Deliver, queued_ns: int) -> None:
        if self._closed:
            return
        began = time.perf_counter_ns()
        try:
            self._follow(ask.from_position, ask.token_ids)
            # What follows a proposal is what followed it before.
            found = self._index.lookup(ask.max_tokens * ask.proposals)
        except Exception:
            structlog.get_logger("specpair.engine").exception("prompt lookup failed")
            deliver(InternalError("the engine failed", reason="ENGINE_FAILED"))
            return
        queue_us, draft_us = (began - queued_ns) // 1000, (time.perf_counter_ns() - began) // 1000
        base_length = ask.base_length
        for index in range(ask.proposals):
            ids = found[index * ask.max_tokens :][: ask.max_tokens]
            deliver(Timed(index, base_length, Proposal(ids), queue_us, draft_us))
            base_length += len(ids)
            queue_us = draft_us = 0


def _on_loop(loop: asyncio.AbstractEventLoop, deliver: Deliver) -> Deliver:
    def forward(answer: Timed | SpecpairError) -> None:
        # A loop that is closed has nobody who waits.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, answer)

    return forward
