"""Laws of the event loop whose time passes while all wait."""

from __future__ import annotations

import asyncio
import time

import pytest

from . import virtual_time


def test_time_passes_only_while_all_wait():
    """Work takes no time, however long it takes; a wait takes exactly what it says, and at once."""

    async def work():
        loop = asyncio.get_running_loop()
        times = [loop.time()]
        for _ in range(1000):
            await asyncio.sleep(0)
        time.sleep(0.01)  # noqa: ASYNC251 - a busy machine
        times.append(loop.time())
        await asyncio.sleep(3600.0)
        times.append(loop.time())
        return times

    began = time.monotonic()
    assert virtual_time.run(work()) == [0.0, 0.0, 3600.0]
    assert time.monotonic() - began < 60.0


def test_no_time_passes_while_another_task_works():
    """Who waits for a limited time does so until nobody can go on any more: work that is under way is never late."""

    async def working(steps):
        for _ in range(steps):
            await asyncio.sleep(0)
        return steps

    async def work():
        return await asyncio.wait_for(asyncio.create_task(working(10_000)), 1e-6)

    assert virtual_time.run(work()) == 10_000


def test_timers_in_order():
    """What waits for less goes first, whenever it began; each sees the time that it waited for."""

    async def work():
        loop, seen = asyncio.get_running_loop(), []

        async def waiting(name, seconds):
            await asyncio.sleep(seconds)
            seen.append((name, loop.time()))

        async def later():
            await asyncio.sleep(1.0)
            await waiting("c", 1.0)

        async with asyncio.TaskGroup() as group:
            group.create_task(waiting("d", 2.5))
            group.create_task(later())
            group.create_task(waiting("b", 0.5))
            group.create_task(waiting("a", 0.25))
        return seen

    assert virtual_time.run(work()) == [("a", 0.25), ("b", 0.5), ("c", 2.0), ("d", 2.5)]


def test_a_time_limit_is_reached_by_what_waits_for_ever():
    """And then exactly the limit has passed."""

    async def work():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 30.0)
        return asyncio.get_running_loop().time()

    assert virtual_time.run(work()) == 30.0


def test_a_deadlock_is_an_error():
    """Tasks that wait for one another, and none of them for a time, are no hang; their `finally` runs."""
    ended = []

    async def forever():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def work():
        await asyncio.gather(forever(), forever())

    with pytest.raises(RuntimeError, match="every task waits"):
        virtual_time.run(work())
    assert ended == [True, True]


def test_a_busy_loop_is_an_error(monkeypatch):
    """A task that never waits keeps time from passing, even if others wait for a time: no hang; its `finally` runs."""
    monkeypatch.setattr(virtual_time, "_BUSY", 10_000)
    ended = []

    async def spinning():
        try:
            while True:  # noqa: ASYNC110 - the very fault
                await asyncio.sleep(0)
        finally:
            ended.append(True)

    async def work():
        async with asyncio.timeout(1.0):
            await spinning()

    with pytest.raises(RuntimeError, match="never waits"):
        virtual_time.run(work())
    assert ended == [True]


@pytest.mark.parametrize("seconds", [0.5, 1e6, float("inf")])
def test_waiting_in_vain_is_an_error(seconds):
    """A task that looks again and again for what never comes, or sleeps for ever, is no hang; its `finally` runs."""
    ended = []

    async def looking():
        try:
            while True:  # noqa: ASYNC110 - the very fault
                await asyncio.sleep(seconds)
        finally:
            ended.append(True)

    with pytest.raises(RuntimeError, match="waits in vain"):
        virtual_time.run(looking())
    assert ended == [True]


def test_work_with_waits_is_no_busy_loop(monkeypatch):
    """Only what was done since the last wait counts."""
    monkeypatch.setattr(virtual_time, "_BUSY", 100)

    async def work():
        for _ in range(100):
            for _ in range(20):
                await asyncio.sleep(0)
            await asyncio.sleep(0.001)
        return asyncio.get_running_loop().time()

    assert virtual_time.run(work()) == pytest.approx(0.1)
