"""What a caller holds while tokens arrive."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

from specpair.clock import loop_time
from specpair.conclusion import conclude
from specpair.errors import DeadlineError, SpecpairError
from specpair.results import Chunk, Result, Stats, Token
from specpair.turn import Turn

__all__ = ["TokenStream"]


class TokenStream:
    """The chunks of one generation, as they are committed: `async for chunk in stream`.

    Iterating raises any exception of `specpair.errors`. Leaving an `async with` block, `aclose` or cancelling the task
    that iterates before the end ends the calls to both services at once, and the session that the stream is a turn of.
    Nothing is sent before the first iteration.
    """

    def __init__(self, turn: Turn, chunks: AsyncGenerator[Chunk], timeout: float | None) -> None:
        self._turn = turn
        self._chunks = chunks
        self._timeout = timeout
        self._deadline: float | None = None
        self._running: bool | None = None

    @property
    def result(self) -> Result:
        """The whole generation. Raises RuntimeError before its end."""
        result = self._turn.result
        if result is None:
            raise RuntimeError("the stream has not reached its end")
        return result

    @property
    def request_id(self) -> str:
        """Under which the logs of both services have the generation."""
        return self._turn.request.id

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The output so far: committed, also if the stream broke off behind it."""
        return self._turn.tokens

    @property
    def stats(self) -> Stats:
        """Statistics so far."""
        return self._turn.stats

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._running is None:
            self._begin()
        try:
            async with asyncio.timeout_at(self._deadline):
                return await anext(self._chunks)
        except TimeoutError:
            if self._turn.result is not None:  # all that was missing is the services' farewell
                self._end(None)
                raise StopAsyncIteration from None
            late = DeadlineError(f"not finished within {self._timeout:g} s", request_id=self.request_id)
            self._end(late)
            raise late from None
        except BaseException as error:
            self._end(error)
            if isinstance(error, SpecpairError):
                error.request_id = error.request_id or self.request_id
            raise

    async def aclose(self) -> None:
        """Ends the calls to both services. To be called by the task that iterates, which others may cancel instead."""
        try:
            await self._chunks.aclose()
        finally:
            # One that another task iterates has its end before it.
            if not (inspect.isasyncgen(self._chunks) and self._chunks.ag_running):
                self._end(None)

    def _begin(self) -> None:
        self._running = True
        if self._timeout is not None:
            self._deadline = loop_time() + self._timeout
        self._turn.request.begin()

    def _end(self, error: BaseException | None) -> None:
        if self._running:
            self._running = False
            conclude(self._turn, error)

    def __del__(self) -> None:
        # A loop over it that was left by `break` closes nothing.
        self._end(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
