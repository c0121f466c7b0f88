"""A TCP proxy on loopback that stands for a network, a good one or a bad one."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

_CHUNK = 64 * 1024
# Pieces under way in one direction of one connection; beyond, the sender is held back as by a full window.
_UNDER_WAY = 1024
# Seconds between looks at whether a stall is over.
_LOOK = 0.005

Way = Literal["upstream", "downstream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Toxics:
    """What happens to the bytes of one direction, in toxiproxy's terms. Any of them may come together."""

    latency: float = 0.0
    """Seconds that every byte is late; how many are under way is not limited by that."""
    jitter: float = 0.0
    """Seconds by which the latency varies to both sides; bytes stay in order."""
    bandwidth: float = math.inf
    """Bytes per second."""
    slicer: int = 0
    """Bytes of the pieces that everything is cut into; 0: it is not."""
    slicer_pause: float = 0.0
    """Seconds between two such pieces."""
    limit_data: int | None = None
    """Bytes after which the connection is closed, in both directions."""
    slow_close: float = 0.0
    """Seconds that the end of the stream is late."""
    stall: bool = False
    """Whether bytes are held back, as by a network that is away; they go on when that is over."""
    timeout: bool = False
    """Whether bytes are taken and never delivered, not even later."""


class TcpProxy:
    """Passes bytes between its own `address` and HOST:PORT; it runs in a thread of its own, in a `with` block.

    `upstream` holds the toxics on the way to HOST:PORT, `downstream` those on the way back: both may be replaced at any
    time, for all connections and for bytes that come from then on. `delay` is the latency of both. Everything may be
    called from any thread.
    """

    def __init__(self, host: str, port: int, *, delay: float = 0.0) -> None:
        self.upstream = self.downstream = Toxics(latency=delay)
        self.accepted = 0  # connections since the start
        self._host, self._port = host, port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        # Bound and never listening: it keeps the port while nothing listens there.
        self._place = bound(0)
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._chance = random.Random(port)

    @classmethod
    def to(cls, address: str, *, delay: float = 0.0) -> Self:
        """A proxy to HOST:PORT in one string."""
        host, _, port = address.rpartition(":")
        return cls(host, int(port), delay=delay)

    @property
    def address(self) -> str:
        """Where to connect, as HOST:PORT."""
        host, port = self._place.getsockname()[:2]
        return f"{host}:{port}"

    @property
    def delay(self) -> float:
        """Seconds that every byte is late, in each direction."""
        return self.upstream.latency

    @delay.setter
    def delay(self, seconds: float) -> None:
        self.upstream = replace(self.upstream, latency=seconds)
        self.downstream = replace(self.downstream, latency=seconds)

    @property
    def open(self) -> int:
        """Connections now."""
        return len(self._connections)

    def afflict(self, *ways: Way, **toxics: Any) -> None:
        """Puts toxics on the ways given, on both if none is; whatever else was there goes."""
        for way in ways or ("upstream", "downstream"):
            setattr(self, way, Toxics(**toxics))

    def heal(self) -> None:
        """Takes all toxics away, and listens."""
        self.afflict()
        self.up()

    def down(self) -> None:
        """Refuses new connections from now on; those that are open stay."""
        self._run(self._stop_listening())

    def up(self) -> None:
        """Takes new connections again."""
        self._run(self._listen())

    def cut(self) -> None:
        """Closes every connection now; what is under way is lost."""
        self._each(_Connection.cut)

    def reset_peer(self) -> None:
        """Resets every connection now, at both ends."""
        self._each(_Connection.reset)

    def half_close(self, way: Way) -> None:
        """Ends one direction of every connection now; the other one goes on."""
        self._each(lambda connection: connection.half_close(way))

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._place.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _each(self, act: Callable[[_Connection], None]) -> None:
        async def acting() -> None:
            for connection in list(self._connections.values()):
                act(connection)

        self._run(acting())

    async def _listen(self) -> None:
        if self._server is None:
            place = bound(self._place.getsockname()[1])
            self._server = await asyncio.start_server(self._connected, sock=place)

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _close(self) -> None:
        await self._stop_listening()
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        connection = _Connection(self, reader, writer)
        task = self._loop.create_task(connection.run(self._host, self._port))
        self._connections[task] = connection
        task.add_done_callback(self._connections.pop)

    def late(self, toxics: Toxics) -> float:
        """Seconds that what comes now is late."""
        return max(0.0, toxics.latency + self._chance.uniform(-1, 1) * toxics.jitter)


class _Connection:
    """One connection of a proxy: from its client to HOST:PORT and back."""

    def __init__(self, proxy: TcpProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        # Who gets what goes in each direction.
        self._writers: dict[Way, asyncio.StreamWriter] = {"downstream": writer}
        self._closed: set[Way] = set()

    async def run(self, host: str, port: int) -> None:
        """Passes bytes on until both directions have ended."""
        with contextlib.suppress(OSError), contextlib.closing(self._writers["downstream"]):
            there_reader, there_writer = await asyncio.open_connection(host, port)
            self._writers["upstream"] = there_writer
            with contextlib.closing(there_writer):
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pass_on("upstream", self._reader))
                    both.create_task(self._pass_on("downstream", there_reader))

    def cut(self) -> None:
        for writer in self._writers.values():
            writer.transport.abort()

    def reset(self) -> None:
        for writer in self._writers.values():
            # A close that leaves nothing to be sent is a reset.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.cut()

    def half_close(self, way: Way) -> None:
        self._closed.add(way)
        if way in self._writers:
            _end(self._writers[way])

    async def _pass_on(self, way: Way, reader: asyncio.StreamReader) -> None:
        """One direction, to its end."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_UNDER_WAY)
        clock = asyncio.get_running_loop().time

        async def arrive() -> None:
            due = 0.0
            data = b"."
            while data:
                data = await _read(reader)
                due = max(due, clock() + self._proxy.late(getattr(self._proxy, way)))
                await waiting.put((due, data))

        async with asyncio.TaskGroup() as both:
            both.create_task(arrive())
            passed = 0
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(due - clock())
                while (toxics := getattr(self._proxy, way)).stall:  # noqa: ASYNC110 - set from any thread
                    await asyncio.sleep(_LOOK)
                if not data:
                    break
                passed = await self._deliver(way, toxics, data, passed)
            await asyncio.sleep(toxics.slow_close)
            _end(self._writers[way])

    async def _deliver(self, way: Way, toxics: Toxics, data: bytes, passed: int) -> int:
        """Sends a piece on in the way that the toxics say; returns how many bytes have been passed on then."""
        if toxics.timeout or way in self._closed:
            return passed
        writer = self._writers[way]
        left = len(data) if toxics.limit_data is None else max(0, toxics.limit_data - passed)
        step = toxics.slicer or _CHUNK
        for at in range(0, min(len(data), left), step):
            piece = data[at : min(at + step, left)]
            with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: this direction has been ended meanwhile
                writer.write(piece)
                await writer.drain()
            await asyncio.sleep(toxics.slicer_pause + len(piece) / toxics.bandwidth)
        if len(data) >= left and toxics.limit_data is not None:
            # What has been passed on still arrives.
            for end in self._writers.values():
                end.close()
        return passed + min(len(data), left)


def bound(port: int) -> socket.socket:
    """A socket that does not listen yet, on a port that others of this kind may have too."""
    place = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind(("127.0.0.1", port))
    return place


def _end(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.write_eof()


async def _read(reader: asyncio.StreamReader) -> bytes:
    """What has come; nothing at the end, also at a hard one."""
    with contextlib.suppress(OSError):
        return await reader.read(_CHUNK)
    return b""
