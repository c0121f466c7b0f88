"""A TCP relay that adds delay: a distant service, imitated on loopback.

Bytes leave in the order in which they came, each half a round trip later. How many are on their way is not limited by
the delay: a network delays what is sent one after the other by the same time, not one behind the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

__all__ = ["relay"]

_CHUNK = 65536
# Pieces under way in one direction of one connection; beyond, the sender is held back as by a full window.
_UNDER_WAY = 4096


@contextlib.asynccontextmanager
async def relay(address: str, round_trip: float) -> AsyncIterator[str]:
    """Listens on a free loopback port and passes everything on to `address`, HOST:PORT, and back.

    Yields its own address. `round_trip` is in seconds, half of it in each direction. Connections end with the block.
    """
    host, _, port = address.rpartition(":")
    connections: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            connections.add(task)
            task.add_done_callback(connections.discard)
        # The block's end cancels; streams ask the server's task for its exception, and there is none to tell.
        with contextlib.suppress(asyncio.CancelledError):
            await _connect(reader, writer, host.strip("[]"), int(port), round_trip / 2)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for connection in list(connections):
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await server.wait_closed()


async def _connect(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, delay: float
) -> None:
    """One connection, until either side ends it."""
    with contextlib.closing(writer):
        try:
            onward_reader, onward_writer = await asyncio.open_connection(host, port)
        except OSError:
            return  # whoever connected sees the connection end, as of a service that is gone
        with contextlib.closing(onward_writer):
            there = asyncio.create_task(_pass_on(reader, onward_writer, delay))
            back = asyncio.create_task(_pass_on(onward_reader, writer, delay))
            try:
                await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (there, back):
                    task.cancel()
                await asyncio.gather(there, back, return_exceptions=True)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """One direction, until its sender ends it."""
    clock = asyncio.get_running_loop().time
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_UNDER_WAY)

    async def take() -> None:
        data = b"."
        while data:
            data = await reader.read(_CHUNK)
            await pieces.put((clock() + delay, data))

    async def give() -> None:
        while True:
            due, data = await pieces.get()
            await asyncio.sleep(max(due - clock(), 0.0))
            if not data:
                return
            writer.write(data)
            await writer.drain()

    async with asyncio.TaskGroup() as both:
        both.create_task(take())
        both.create_task(give())
