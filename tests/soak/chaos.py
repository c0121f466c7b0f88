"""Services that are killed and started again, and what else happens to them."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from ..e2e.processes import Service
from ..proxy import TcpProxy
from .gauges import Life

_KILLS = ("kill target", "kill draft")
_STOPPED = 3.0
_STALLED = 1.0


class Victim:
    """A service on one port through all of its lives, and the proxy that clients reach it by."""

    def __init__(self, role: str, logs: Path, *flags: str) -> None:
        self.role = role
        self._service = Service(role, logs / f"{role}.log", *flags)
        self.lives = [Life(self._service.process.pid)]
        self.proxy = TcpProxy("127.0.0.1", self._service.port)

    def __enter__(self) -> Victim:
        try:
            assert self._service.address
            self.proxy.__enter__()
        except BaseException:
            self._service.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.__exit__()
        self._service.stop()

    def kill(self) -> None:
        """Kills the process and starts the next one; returns when that is healthy."""
        self._service.send(signal.SIGKILL)
        self._service.wait()
        self._service.restart()
        self.lives.append(Life(self._service.process.pid))
        assert self._service.address

    def stop_for(self, seconds: float) -> None:
        """The process stands still for a while."""
        self._service.send(signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            self._service.send(signal.SIGCONT)

    def stall_for(self, seconds: float) -> None:
        """The network does."""
        self.proxy.afflict(stall=True)
        time.sleep(seconds)
        self.proxy.heal()

    def wait_until_free(self) -> None:
        """Waits until no slot is in use."""
        self._service.wait_until_free(30)


class Chaos:
    """Kills target and draft in turn, one every `interval` seconds by the clock, beside lesser accidents, of which each
    comes that long after the last one.

    While the one whose turn it is has not come back from its last death, the other one is killed in its place. `events`
    counts what has happened, a kill when the service is back, and under `NOBODY` the moments at which neither was there
    to be killed.
    """

    NOBODY = "both starting"

    def __init__(self, target: Victim, draft: Victim, interval: float) -> None:
        self.events: Counter[str] = Counter()
        self._interval = interval
        self._victims = dict(zip(_KILLS, (target, draft), strict=True))
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._accidents: Iterator[tuple[str, Callable[[], None]]] = itertools.cycle(
            [
                ("cut target", target.proxy.cut),
                ("stop draft", lambda: draft.stop_for(_STOPPED)),
                ("reset target", target.proxy.reset_peer),
                ("cut draft", draft.proxy.cut),
                ("stall target", lambda: target.stall_for(_STALLED)),
                ("half-close target", lambda: target.proxy.half_close("downstream")),
                ("reset draft", draft.proxy.reset_peer),
            ]
        )

    @property
    def rounds(self) -> int:
        """How often both have been killed and come back."""
        return min(self.events[kill] for kill in _KILLS)

    async def rage(self) -> None:
        """Until it is cancelled; what has begun is brought to its end. Raises what a kill or an accident raises."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        disturbing = asyncio.create_task(self._disturb())
        try:
            for number in itertools.count(1):
                await asyncio.sleep(begin + number * self._interval - loop.time())
                if disturbing.done():
                    disturbing.result()
                self._kill_one(_KILLS[number % 2 - 1], _KILLS[number % 2])
        finally:
            disturbing.cancel()
            ended = await asyncio.gather(disturbing, *self._starting.values(), return_exceptions=True)
            for failure in ended:
                if isinstance(failure, Exception):
                    raise failure
            self.events.update(list(self._starting))

    def _kill_one(self, *names: str) -> None:
        """The first of them that lives."""
        for name, starting in list(self._starting.items()):
            if starting.done():
                starting.result()
                del self._starting[name]
                self.events[name] += 1
        name = next((name for name in names if name not in self._starting), None)
        if name is None:
            self.events[self.NOBODY] += 1
        else:
            self._starting[name] = asyncio.create_task(asyncio.to_thread(self._victims[name].kill))

    async def _disturb(self) -> None:
        await asyncio.sleep(self._interval / 2)
        for name, act in self._accidents:
            await _to_its_end(asyncio.to_thread(act))
            self.events[name] += 1
            await asyncio.sleep(self._interval)


async def _to_its_end(work: Awaitable[None]) -> None:
    """Waits for work in a thread, which nobody can stop, also if this is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        task.result()
        raise
