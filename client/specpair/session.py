"""Sessions: drive the law of `loop` over the transports, turn by turn. Nothing outlives its session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self

from specpair.chaining import Chain
from specpair.connection import Connection, SessionConnection
from specpair.drafting import SessionDraft
from specpair.errors import ProtocolError, SpecpairError, UnavailableError
from specpair.loop import Loop
from specpair.losses import SESSION_ENDED
from specpair.messages import DraftStart, Started
from specpair.params import Prediction, Prompt, SamplingParams
from specpair.proposers import Proposer
from specpair.request import RequestContext
from specpair.request_ids import request_id_of
from specpair.results import Chunk, Result
from specpair.resuming import Way
from specpair.stream import TokenStream
from specpair.transports import CLOSED, Receiver
from specpair.turn import Turn

__all__ = ["Session", "follow"]

# Seconds that the services have to end a finished session's streams before they are cancelled.
_FAREWELL = 0.5


class Session:
    """Several turns on one stream, one KV slot and one cache at the target, and the same at the draft.

        async with client.session() as session:
            await session.generate("def area(radius):\\n", params)
            async for chunk in session.stream("\\n\\nprint(area(", params):
                ...

    The first turn's prompt is text, token ids or a conversation. A later turn's prompt stands behind everything said so
    far, and only what is new is computed, as `Stats.cached_tokens` shows: text, which is tokenized without special
    tokens; token ids; or, in a session that began with a conversation, the new messages without the earlier ones and
    their answers. The output is that of a fresh session given the whole, up to rounding: what is cached was computed in
    other blocks than those of a prompt.

    One turn at a time: a turn that begins before the last one has reached its end raises RuntimeError. A turn that
    fails, is cancelled or is left before its end takes the session with it; UnavailableError tells those who go on.

    A target that is lost, in a turn or between two, takes nothing with it: the session is opened again from its own
    log, where the target is back or at another one, and `Stats.resumes` counts it. A first turn goes on bit by bit as
    it would have. In a later one everything before its output is then computed as a prompt, which is the same up to
    rounding, as above: in fp32 the tokens were equal in all tests, in bf16 a close choice may fall otherwise.
    """

    def __init__(self, way: Way, draft: SessionDraft, request: Callable[[], RequestContext] | None = None) -> None:
        """`request` makes what logs and traces know a turn by, each with the same id."""
        self._request = request or partial(RequestContext, request_id_of())
        self._connection = SessionConnection(way)
        self._draft = draft
        self._last: Loop | None = None
        self._turn: Turn | None = None
        self._ended = ""

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prediction: Prediction | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the same as in `stream`
    ) -> Result:
        """The next turn. Raises any exception of `specpair.errors`; DeadlineError after `timeout` seconds."""
        async with self.stream(prompt, params, prediction=prediction, timeout=timeout) as stream:
            async for _ in stream:
                pass
        return stream.result

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prediction: Prediction | None = None,
        timeout: float | None = None,
    ) -> TokenStream:
        """The next turn, chunk by chunk. It begins with the first iteration."""
        turn = Turn(prompt, params or SamplingParams(), prediction, self._request())
        return TokenStream(turn, self._speculate(turn), timeout)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens of the session so far, prompts and outputs."""
        return tuple(self._last.token_ids) if self._last else ()

    @property
    def request_id(self) -> str:
        """Under which the logs of both services have the session, and the results of all of its turns."""
        return self._request().id

    async def aclose(self) -> None:
        """Ends both streams, which frees their slots; a turn that is under way elsewhere fails."""
        polite = not self._ended and not self._under_way
        self._ended = self._ended or "it was closed"
        try:
            if polite and self._turn is not None:
                await _farewell(self._connection.stream, self._draft)
        finally:
            self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._ended = self._ended or "it was left with an exception"
        await self.aclose()

    async def only(self, turn: Turn) -> AsyncGenerator[Chunk]:
        """One turn and the end of the session."""
        async with self, contextlib.aclosing(self._speculate(turn)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _speculate(self, turn: Turn) -> AsyncGenerator[Chunk]:
        """A turn of speculative decoding; who proposes is settled first, so that a failure there costs no slot.

        Yields one chunk per round that committed something. Raises what the transport raises, and ProtocolError if the
        target contradicts itself. Where the target is lost the turn goes on with another stream.
        """
        last = self._turn
        with self._whole(turn):
            plan = await self._draft.plan(turn)
            started = await self._connection.begin(turn, last)
            loop = self._last = turn.begin(started, vocabulary_size=plan.vocabulary_size, last=self._last)
            start = DraftStart(tuple(loop.token_ids), turn.params, session_id=started.session_id, request=turn.request)
            proposer = plan.proposer(start)
            while loop.finish_reason is None:
                try:
                    async with contextlib.aclosing(self._rounds(turn, loop, proposer)) as chunks:
                        async for chunk in chunks:
                            self._connection.progress()
                            if chunk.finish_reason is not None:
                                self._draft.keep(turn)
                            yield chunk
                except SpecpairError as lost:
                    await self._connection.resume(turn, lost)

    async def _rounds(self, turn: Turn, loop: Loop, proposer: Proposer) -> AsyncGenerator[Chunk]:
        """The rounds of a turn, to its end or that of the stream."""
        async with Chain(self._connection.stream, loop, proposer, turn.meter, self._draft.depth) as chain:
            while loop.finish_reason is None:
                while chain.room:
                    if (answered := await chain.propose()) is not None:
                        await chain.send(loop.verify(*answered))
                while chain.steady:
                    await chain.step()
                verdict, sent = await chain.verdict(), loop.under_way
                chunk = loop.commit(verdict)
                if sent is not None and not verdict.stale:
                    round = chain.learn(sent, verdict)
                    if turn.request.recording:
                        turn.request.round(round)
                    yield chunk
                    turn.meter.resumed()

    @property
    def _under_way(self) -> bool:
        """Whether a turn has begun and not reached its end."""
        return self._turn is not None and not self._turn.ended

    @contextlib.contextmanager
    def _whole(self, turn: Turn) -> Iterator[None]:
        """Lets one turn in at a time; one that does not reach its end takes the session with it."""
        if self._ended:
            raise self._over()
        if self._under_way:
            raise RuntimeError("the session's last turn has not reached its end")
        self._turn = turn
        try:
            yield
        except BaseException as error:
            if self._ended and isinstance(error, UnavailableError) and error.reason in (CLOSED, SESSION_ENDED):
                raise self._over() from None  # whatever the turn was waiting for
            if not turn.ended:
                failed = isinstance(error, SpecpairError)
                self._ended = self._ended or (f"a turn failed: {error}" if failed else "a turn was left before its end")
                self._cancel()
            raise

    def _over(self) -> UnavailableError:
        return UnavailableError(f"the session has ended: {self._ended}", reason=SESSION_ENDED)

    def _cancel(self) -> None:
        self._connection.cancel()
        self._draft.cancel()


async def follow(way: Way, turn: Turn) -> AsyncGenerator[Chunk]:
    """Plain decoding in the target's own loop. Yields one chunk per message; raises as a turn of a session does."""
    connection = Connection(way, lambda target, start, within: target.generate(start, within))
    try:
        loop = turn.begin(await connection.begin(turn))
        while loop.finish_reason is None:
            try:
                committed = await connection.stream.receive()
                if isinstance(committed, Started):
                    raise ProtocolError("the target started twice")
                chunk = loop.append(committed)
            except SpecpairError as lost:
                await connection.resume(turn, lost)
                continue
            turn.meter.token()
            connection.progress()
            yield chunk
        await _farewell(connection.stream)
    finally:
        connection.cancel()


async def _farewell(*streams: Receiver[Any] | SessionDraft) -> None:
    """Ends streams politely. The tokens are complete: a failure from here on is nobody's loss."""
    with contextlib.suppress(SpecpairError, TimeoutError):
        async with asyncio.timeout(_FAREWELL):
            await asyncio.gather(*(stream.finish() for stream in streams))
