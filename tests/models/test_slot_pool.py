"""The slot pool: lowest slot first, first come first served, and none ever lost."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpair.errors import OverloadedError
from specpair_runtime.slots import SlotPool


def pool_of(slots, max_waiting=100, max_patience=60.0):
    return SlotPool(slots, max_waiting, max_patience)


async def settle():
    """Lets every task run as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_lowest_slot_first():
    """Sessions get the lowest free slots, in whatever order they came back."""

    async def check():
        pool = pool_of(4)
        assert [await pool.acquire() for _ in range(4)] == [0, 1, 2, 3]
        for slot in (2, 0, 3):
            pool.release(slot)
        assert pool.in_use == 1
        assert [await pool.acquire() for _ in range(3)] == [0, 2, 3]

    asyncio.run(check())


def test_first_come_first_served():
    """Whoever waits longest gets the next slot that is released, and nobody who comes later passes."""

    async def check():
        pool = pool_of(1)
        await pool.acquire()
        order = []

        async def wait(name):
            slot = await pool.acquire()
            order.append(name)
            pool.release(slot)

        waiting = [asyncio.create_task(wait(name)) for name in range(5)]
        await settle()
        pool.release(0)
        # The slot is handed over at once: no newcomer finds it free.
        assert pool.in_use == 1
        waiting.append(asyncio.create_task(wait("late")))
        await asyncio.gather(*waiting)
        assert order == [0, 1, 2, 3, 4, "late"]
        assert pool.in_use == 0

    asyncio.run(check())


@pytest.mark.parametrize(("max_patience", "patience"), [(0.01, None), (60.0, 0.01), (0.01, 60.0), (60.0, 0.0)])
def test_patience_ends(max_patience, patience):
    """A session waits for its own time or the pool's, whichever is shorter; then it is told why it got no slot."""

    async def check():
        pool = pool_of(1, max_patience=max_patience)
        await pool.acquire()
        with pytest.raises(OverloadedError) as error:
            await pool.acquire(patience)
        assert error.value.reason == "KV_SLOTS_EXHAUSTED"
        pool.release(0)
        assert pool.in_use == 0
        assert await pool.acquire() == 0

    asyncio.run(check())


def test_a_long_queue_is_refused_at_once():
    """When as many wait as may, one more is told so without waiting; those that wait are not disturbed."""

    async def check():
        pool = pool_of(1, max_waiting=2)
        await pool.acquire()
        waiting = [asyncio.create_task(pool.acquire()) for _ in range(2)]
        await settle()
        with pytest.raises(OverloadedError) as error:
            await pool.acquire()
        assert error.value.reason == "KV_SLOTS_EXHAUSTED"
        pool.release(0)
        assert await waiting[0] == 0
        # Its place in the queue is free again.
        waiting.append(asyncio.create_task(pool.acquire()))
        await settle()
        for task in waiting[1:]:
            pool.release(0)
            assert await task == 0

    asyncio.run(check())


def test_no_queue_at_all():
    """With a queue of none a session gets a free slot or an answer at once."""

    async def check():
        pool = pool_of(1, max_waiting=0)
        assert await pool.acquire() == 0
        with pytest.raises(OverloadedError):
            await pool.acquire()

    asyncio.run(check())


@pytest.mark.parametrize("cancelled_first", [True, False])
def test_a_cancelled_waiter_hands_its_slot_on(cancelled_first):
    """A waiter that is cancelled in the moment in which it gets a slot ends as cancelled, and the next one has it."""

    async def check():
        pool = pool_of(1)
        await pool.acquire()
        first, second = (asyncio.create_task(pool.acquire()) for _ in range(2))
        await settle()
        if cancelled_first:
            first.cancel()
            pool.release(0)
        else:
            pool.release(0)
            first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second == 0
        pool.release(0)
        assert pool.in_use == 0

    asyncio.run(check())


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["acquire", "release", "cancel", "settle"]), st.integers(0, 9)), max_size=40
)


@given(slots=st.integers(1, 3), max_waiting=st.integers(0, 4), actions=ACTIONS)
def test_every_slot_has_one_owner(slots, max_waiting, actions):
    """Whatever is acquired, released and cancelled in any order, no slot has two owners, none is lost, and nobody is
    left waiting while a slot is free."""

    async def check():
        pool = pool_of(slots, max_waiting)
        tasks: deque[asyncio.Task[int]] = deque()
        owned: list[int] = []

        def collect():
            for task in [task for task in tasks if task.done()]:
                tasks.remove(task)
                if not task.cancelled() and task.exception() is None:
                    owned.append(task.result())

        for action, number in actions:
            if action == "acquire":
                tasks.append(asyncio.create_task(pool.acquire()))
                # A session that asks is known to the pool before anything else happens.
                await asyncio.sleep(0)
            elif action == "release" and owned:
                pool.release(owned.pop(number % len(owned)))
            elif action == "cancel" and tasks:
                tasks[number % len(tasks)].cancel()
            elif action == "settle":
                await settle()
                collect()
                assert len(owned) == pool.in_use
                assert not tasks or pool.in_use == slots
            assert len(set(owned)) == len(owned)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        collect()
        for slot in owned:
            pool.release(slot)
        assert pool.in_use == 0
        assert [await pool.acquire() for _ in range(slots)] == list(range(slots))

    asyncio.run(check())
