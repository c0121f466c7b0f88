"""A TCP proxy on loopback that stands for a network."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, Self

_CHUNK = 64 * 1024


class TcpProxy:
    """Passes bytes between its own `address` and HOST:PORT, `delay` seconds late in each direction.

    The delay is that of a long way: it holds up every byte alike, without limiting how many are under way. It may be
    changed at any time, for bytes that come from then on. The proxy runs in a thread of its own, in a `with` block.
    """

    def __init__(self, host: str, port: int, *, delay: float = 0.0) -> None:
        self.delay = delay
        self._host, self._port = host, port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @classmethod
    def to(cls, address: str, *, delay: float = 0.0) -> Self:
        """A proxy to HOST:PORT in one string."""
        host, _, port = address.rpartition(":")
        return cls(host, int(port), delay=delay)

    @property
    def address(self) -> str:
        """Where to connect, as HOST:PORT."""
        assert self._server is not None, "the proxy has not been started"
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._connected, "127.0.0.1", 0))
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = self._loop.create_task(self._connection(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
            with contextlib.closing(there_writer):
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._way(reader, there_writer))
                    both.create_task(self._way(there_reader, writer))

    async def _way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction, to its end."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def arrive() -> None:
            while data := await self._read(reader):
                waiting.put_nowait((self._loop.time() + self.delay, data))
            waiting.put_nowait((self._loop.time() + self.delay, b""))

        async with asyncio.TaskGroup() as both:
            both.create_task(arrive())
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(due - self._loop.time())
                if not data:
                    break
                with contextlib.suppress(OSError):
                    writer.write(data)
                    await writer.drain()
            with contextlib.suppress(OSError):
                writer.write_eof()

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> bytes:
        """What has come; nothing at the end, also at a hard one."""
        with contextlib.suppress(OSError):
            return await reader.read(_CHUNK)
        return b""
