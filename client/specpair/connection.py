"""The call that a turn runs on: opened, and opened again behind the committed tokens after the target was lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from specpair.errors import ProtocolError, SpecpairError, UnavailableError
from specpair.losses import SESSION_ENDED, is_lost
from specpair.messages import Extend, Start, Started
from specpair.resuming import Way
from specpair.transcript import Transcript, is_chat
from specpair.transports import Receiver, TargetTransport, VerifyStream
from specpair.turn import Turn

__all__ = ["Connection", "SessionConnection"]

S = TypeVar("S", bound=Receiver[Any])
T = TypeVar("T")


class Connection(Generic[S]):
    """One call at a time, made by `call`, on the way of a session. What it raises is what is raised there."""

    def __init__(self, way: Way, call: Callable[[TargetTransport, Start, float | None], Awaitable[S]]) -> None:
        self._way = way
        self._call = call
        self._stream: S | None = None
        self._closed = False
        self._before = Transcript()

    @property
    def stream(self) -> S:
        """The call: another one after every loss. To be asked for once there is one."""
        assert self._stream is not None, "the connection was opened"
        return self._stream

    async def begin(self, turn: Turn) -> Started:
        """Opens the session with its first turn."""
        return await self._way.begin(lambda target: self._start(turn, target))

    async def resume(self, turn: Turn, lost: SpecpairError) -> None:
        """Goes on with a turn after the call has failed. Its loop then stands where the new call does."""
        await self._resumed(turn, lost, lambda target: self._again(turn, target))

    def progress(self) -> None:
        """The target has committed something."""
        self._way.progress()

    def cancel(self) -> None:
        """Gives the call up, and every attempt to open another one."""
        self._closed = True
        if self._stream is not None:
            self._stream.cancel()

    async def _resumed(self, turn: Turn, lost: SpecpairError, open: Callable[[TargetTransport], Awaitable[T]]) -> T:
        """What `open` brings at a target that goes on, told to the turn. Raises what the way raises."""
        if is_lost(lost):
            turn.request.event("target lost", error=type(lost).__name__, reason=lost.reason)
        opened = await self._way.resume(lost, turn.request.id, open)
        turn.request.event("resumed")
        turn.meter.resumes += 1
        return opened

    async def _start(self, turn: Turn, target: TargetTransport) -> Started:
        start = await self._before.start(turn, target, self._way.left)
        started = await self._open(start, target)
        if self._before.token_ids and not is_chat(start.prompt) and started.prompt_token_ids != start.prompt:
            raise ProtocolError("the target begins the turn with other tokens than it was given")
        return started

    async def _again(self, turn: Turn, target: TargetTransport) -> None:
        started = await self._open(self._before.again(turn, chat=False), target)
        assert turn.loop is not None, "the turn has begun"
        turn.loop.resume(started)

    async def _open(self, start: Start, target: TargetTransport) -> Started:
        """A call in the place of the last one."""
        if self._closed:
            raise UnavailableError("the session has ended", reason=SESSION_ENDED)
        if self._stream is not None:
            self._stream.cancel()
        self._stream = await self._call(target, start, self._way.left)
        if self._closed:  # meanwhile
            self._stream.cancel()
            raise UnavailableError("the session has ended", reason=SESSION_ENDED)
        message = await self._stream.receive()
        if not isinstance(message, Started):
            raise ProtocolError("the target's first message is not `started`")
        self._way.check(message)
        return message


class SessionConnection(Connection[VerifyStream]):
    """The stream of a session of several turns.

    A conversation is opened again as one, so that the target can go on with it in later turns. Where that makes other
    tokens than it did before, as a template that writes the date does on the next day, the turn goes on with its
    tokens, and the next one begins with the whole conversation on a new stream.
    """

    def __init__(self, way: Way) -> None:
        super().__init__(way, lambda target, start, within: target.verify(start, within))
        self._forgotten = False

    async def begin(self, turn: Turn, last: Turn | None = None) -> Started:
        """Opens the session, or its next turn behind `last`."""
        if last is None or self._stream is None:
            return await super().begin(turn)
        self._before = self._before.after(last)
        try:
            if self._forgotten and self._before.messages and is_chat(turn.prompt):
                self._forgotten = False
                return await self._way.again(lambda target: self._start(turn, target))
            return await self._extend(turn)
        except SpecpairError as lost:
            return await self._resumed(turn, lost, lambda target: self._start(turn, target))

    async def _extend(self, turn: Turn) -> Started:
        await self.stream.send(Extend(turn.prompt, turn.params))
        while not isinstance(message := await self.stream.receive(), Started):
            if not message.stale:  # else it echoes a block of the last turn
                raise ProtocolError("the target's first message is not `started`")
        return message

    async def _again(self, turn: Turn, target: TargetTransport) -> None:
        start = self._before.again(turn, chat=True)
        started = await self._open(start, target)
        assert turn.loop is not None, "the turn has begun"
        if is_chat(start.prompt) and not turn.loop.stands_at(started):
            self._forgotten = True
            await super()._again(turn, target)
        else:
            turn.loop.resume(started)
