"""Sessions: drive the law of `loop` over the transports, turn by turn. Nothing outlives its session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from types import TracebackType
from typing import Any, Self

from specpair.chaining import Chain
from specpair.drafting import SessionDraft
from specpair.errors import ProtocolError, SpecpairError, UnavailableError
from specpair.loop import Loop
from specpair.messages import DraftStart, Extend, Start, Started
from specpair.params import Prediction, Prompt, SamplingParams
from specpair.results import Chunk, Result
from specpair.stream import TokenStream
from specpair.transports import Receiver, TargetTransport, VerifyStream
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
    """

    def __init__(
        self,
        target: TargetTransport,
        draft: SessionDraft,
        *,
        within: float | None = None,
    ) -> None:
        self._target = target
        self._draft = draft
        self._within = within
        self._stream: VerifyStream | None = None
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
        turn = Turn(prompt, params or SamplingParams(), prediction)
        return TokenStream(turn, self._speculate(turn), timeout)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens of the session so far, prompts and outputs."""
        return tuple(self._last.token_ids) if self._last else ()

    async def aclose(self) -> None:
        """Ends both streams, which frees their slots; a turn that is under way elsewhere fails."""
        polite = not self._ended and not self._under_way
        self._ended = self._ended or "it was closed"
        try:
            if polite and self._stream is not None:
                await _farewell(self._stream, self._draft)
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
        target contradicts itself.
        """
        with self._whole(turn):
            plan = await self._draft.plan(turn)
            stream, started = await self._begin(turn)
            loop = self._last = turn.begin(started, vocabulary_size=plan.vocabulary_size, last=self._last)
            proposer = plan.proposer(DraftStart(tuple(loop.token_ids), turn.params, session_id=started.session_id))
            async with Chain(stream, loop, proposer, turn.meter, self._draft.depth) as chain:
                while loop.finish_reason is None:
                    while chain.room:
                        if (answered := await chain.propose()) is not None:
                            await chain.send(loop.verify(*answered))
                    while chain.steady:
                        await chain.step()
                    verdict, sent = await chain.verdict(), loop.under_way
                    chunk = loop.commit(verdict)
                    if sent is not None and not verdict.stale:
                        chain.learn(sent, verdict)
                        yield chunk
                        turn.meter.resumed()
            self._draft.keep(turn)

    async def _begin(self, turn: Turn) -> tuple[VerifyStream, Started]:
        """Opens the session, or its next turn."""
        if self._stream is None:
            self._stream = await self._target.verify(Start(turn.prompt, turn.params), self._within)
        else:
            await self._stream.send(Extend(turn.prompt, turn.params))
        while not isinstance(message := await self._stream.receive(), Started):
            if self._last is None or not message.stale:  # else it echoes a block of the last turn
                raise ProtocolError("the target's first message is not `started`")
        return self._stream, message

    @property
    def _under_way(self) -> bool:
        """Whether a turn has begun and not reached its end."""
        return self._turn is not None and not self._turn.ended

    @contextlib.contextmanager
    def _whole(self, turn: Turn) -> Iterator[None]:
        """Lets one turn in at a time; one that does not reach its end takes the session with it."""
        if self._ended:
            raise UnavailableError(f"the session has ended: {self._ended}", reason="SESSION_ENDED")
        if self._under_way:
            raise RuntimeError("the session's last turn has not reached its end")
        self._turn = turn
        try:
            yield
        except BaseException as error:
            if not turn.ended:
                failed = isinstance(error, SpecpairError)
                self._ended = self._ended or (f"a turn failed: {error}" if failed else "a turn was left before its end")
                self._cancel()
            raise

    def _cancel(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
        self._draft.cancel()


async def follow(target: TargetTransport, turn: Turn, within: float | None = None) -> AsyncGenerator[Chunk]:
    """Plain decoding in the target's own loop. Yields one chunk per message; raises as a turn of a session does."""
    receiver = await target.generate(Start(turn.prompt, turn.params), within)
    try:
        loop = turn.begin(await receiver.receive())
        while loop.finish_reason is None:
            committed = await receiver.receive()
            if isinstance(committed, Started):
                raise ProtocolError("the target started twice")
            chunk = loop.append(committed)
            turn.meter.token()
            yield chunk
        await _farewell(receiver)
    finally:
        receiver.cancel()


async def _farewell(*streams: Receiver[Any] | SessionDraft) -> None:
    """Ends streams politely. The tokens are complete: a failure from here on is nobody's loss."""
    with contextlib.suppress(SpecpairError, TimeoutError):
        async with asyncio.timeout(_FAREWELL):
            await asyncio.gather(*(stream.finish() for stream in streams))
