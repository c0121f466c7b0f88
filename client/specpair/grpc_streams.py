"""One call with a stream, by grpc.aio: its failures are exceptions of `specpair.errors`, as the service said them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message
from grpc import aio

from specpair.errors import ProtocolError, SpecpairError, UnavailableError, from_rpc_error
from specpair.handshake import explained
from specpair.transports import CLOSED, STREAM_ENDED

__all__ = ["GrpcStream", "translated"]

# Seconds that the status of a call which takes no message any more may be on its way. It is here, but for a fault.
_STATUS = 5.0
# Of gRPC's inner call: sends bytes, and does nothing to the call where that fails.
_SEND = "send_serialized_message"

Received = TypeVar("Received")
Sent = TypeVar("Sent")
_Call = aio.StreamStreamCall[Any, Any] | aio.UnaryStreamCall[Any, Any]


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Failed calls become exceptions of `specpair.errors`; so do calls that somebody else has given up."""
    try:
        yield
    except grpc.RpcError as failed:
        raise explained(from_rpc_error(failed)) from None
    except asyncio.CancelledError:
        # grpc raises it for a call that was cancelled here, too: then nobody has cancelled this task.
        if (task := asyncio.current_task()) is None or task.cancelling():
            raise
        raise _given_up() from None
    except aio.UsageError:
        raise UnavailableError("the client is closed", reason=CLOSED) from None


class GrpcStream(Generic[Sent, Received]):
    """A call with a stream of responses, and perhaps one of requests.

    gRPC ends a call when a task that reads or writes is cancelled; here it is not more than the task that ends. For
    that each operation runs as a task of its own, and the next one of its kind waits for it.

    Once it is cancelled nothing here leads to the call any more. A call holds its channel, also one that is closed, and
    that goes on trying to reach a service that is gone; exceptions make circles, so that the call would be held until
    the garbage collector comes.
    """

    def __init__(self, call: _Call, decode: Callable[[Any], Received], encode: Callable[[Sent], Message]) -> None:
        self._call: _Call | None = call
        self._decode = decode
        self._encode = encode
        self._reading: asyncio.Future[Any] | None = None
        self._writing: asyncio.Future[None] | None = None

    async def begin(self, first: Message) -> None:
        """Sends the first message. Whoever does not see it sent gives the call up."""
        try:
            await self._write(first)
        except BaseException:
            self.cancel()
            raise

    async def send(self, message: Sent) -> None:
        await self._write(self._encode(message))

    async def receive(self) -> Received:
        with translated():
            response = await self._read()
        if response is aio.EOF:
            raise _ended_early()
        if response is None:
            raise ProtocolError("the service sent bytes that are no message")
        return self._decode(response)

    async def finish(self) -> None:
        with translated():
            if self._writing is not None:
                await asyncio.wait((self._writing,))
            if isinstance(self._call, aio.StreamStreamCall):
                with contextlib.suppress(aio.InternalError):  # it has just ended: reading says how
                    await self._call.done_writing()
            while await self._read() is not aio.EOF:
                pass

    def cancel(self) -> None:
        if self._call is None:
            return
        self._call.cancel()
        if self._writing is not None:
            # A call that has not got as far as its metadata never wakes who waits to write.
            self._writing.cancel()
        self._call = self._reading = self._writing = None

    async def _read(self) -> Any:  # noqa: ANN401 - what gRPC reads
        if self._call is None:
            raise _given_up()
        if self._reading is None:
            self._reading = _on_its_own(self._call.read)
        response = await asyncio.shield(self._reading)
        self._reading = None
        return response

    async def _write(self, request: Message) -> None:
        if self._call is None:
            raise _given_up()
        self._writing = _on_its_own(partial(_write_behind, self._writing, self._call, request))
        with translated():
            try:
                await asyncio.shield(self._writing)
                return
            except asyncio.InvalidStateError:
                pass
        raise await self._status()

    async def _status(self) -> SpecpairError:
        """Why the call has ended. What the service said before is of no use to who wants to say more."""
        if (call := self._call) is None:
            return _given_up()
        try:
            async with asyncio.timeout(_STATUS):
                code, details = await call.code(), await call.details()
                initial, trailing = await call.initial_metadata(), await call.trailing_metadata()
        except TimeoutError:
            return UnavailableError("the call takes no message and does not end")
        if self._call is None:  # meanwhile
            return _given_up()
        if code is grpc.StatusCode.OK:
            return _ended_early()
        return explained(from_rpc_error(aio.AioRpcError(code, initial, trailing, details)))


def _given_up() -> UnavailableError:
    return UnavailableError("the call was ended on this side", reason=CLOSED)


def _ended_early() -> ProtocolError:
    return ProtocolError("the service ended the stream early", reason=STREAM_ENDED)


async def _write_behind(last: asyncio.Future[None] | None, call: _Call, request: Message) -> None:
    """Raises InvalidStateError if the call has ended, or its status where there never was a connection."""
    assert isinstance(call, aio.StreamStreamCall)
    if last is not None and not last.done():
        await last
    # A call's own `write` may meet an end whose status has come and is not known yet. It then makes one up, INTERNAL,
    # and what the service said is lost. So this is `write` without that.
    send = getattr(getattr(call, "_cython_call", None), _SEND, None)
    if send is None:  # another version of gRPC
        await call.write(request)
        return
    if call.done():
        raise asyncio.InvalidStateError
    await call.wait_for_connection()
    try:
        await send(request.SerializeToString())
    except aio.InternalError:
        raise asyncio.InvalidStateError from None


def _on_its_own(work: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Future[Any]:
    """A task that nobody needs to wait for in the end."""
    task = asyncio.ensure_future(_traceless(work))
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


async def _traceless(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:  # noqa: ANN401 - what gRPC brings
    """Without the part of a failure's traceback that leads to the call."""
    begun = work()
    del work
    try:
        return await begun
    except grpc.RpcError as failed:
        raise failed.with_traceback(None)  # noqa: B904 - it is the same one
