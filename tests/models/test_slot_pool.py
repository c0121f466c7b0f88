"""The slot pool: lowest slot first, first come first served, clients in turns, and none ever lost."""

from __future__ import annotations

import asyncio
import time
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpair.errors import OverloadedError
from specpair_runtime.serving import Caller
from specpair_runtime.slots import SlotPool


def pool_of(slots, max_waiting=100, max_patience=60.0, max_sessions=0):
    return SlotPool(slots, max_waiting, max_patience, max_sessions)


def within(seconds):
    """A caller with so much time left."""
    return Caller(deadline=None if seconds is None else time.monotonic() + seconds)


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
            await pool.acquire(within(patience))
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
        assert error.value.reason == "QUEUE_FULL"
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


def test_clients_take_turns():
    """A client that asks first for many slots delays another one by one of them, not by all."""

    async def check():
        pool = pool_of(1)
        await pool.acquire()
        order = []

        async def wait(identity, number):
            slot = await pool.acquire(Caller(identity))
            order.append((identity, number))
            pool.release(slot)

        names = [("many", 0), ("many", 1), ("many", 2), ("many", 3), ("one", 0), ("few", 0), ("few", 1)]
        waiting = []
        for identity, number in names:
            waiting.append(asyncio.create_task(wait(identity, number)))
            await settle()
        pool.release(0)
        await asyncio.gather(*waiting)
        assert order == [("many", 0), ("one", 0), ("few", 0), ("many", 1), ("few", 1), ("many", 2), ("many", 3)]
        assert pool.in_use == 0

    asyncio.run(check())


def test_a_full_queue_still_takes_who_has_less_in_it():
    """A client that fills the queue shuts nobody out: its newest session makes room for another client's, as long as it
    has more in the queue than that one."""

    async def check():
        pool = pool_of(1, max_waiting=4)
        await pool.acquire()
        greedy = [asyncio.create_task(pool.acquire(Caller("greedy"))) for _ in range(4)]
        await settle()
        modest = []
        for _ in range(2):
            modest.append(asyncio.create_task(pool.acquire(Caller("modest"))))
            await settle()
        for task in greedy[2:]:
            assert isinstance(task.exception(), OverloadedError)
            assert task.exception().reason == "QUEUE_FULL"
        with pytest.raises(OverloadedError) as error:
            await pool.acquire(Caller("modest"))
        assert error.value.reason == "QUEUE_FULL"
        for task in (greedy[0], modest[0], greedy[1], modest[1]):
            pool.release(0)
            assert await task == 0
        pool.release(0)
        assert pool.in_use == 0

    asyncio.run(check())


def test_sessions_per_client():
    """A client has no more than its sessions at a time, those that wait included; others are not counted with it."""

    async def check():
        pool = pool_of(2, max_sessions=2)
        mine, other = Caller("mine"), Caller("other")
        assert await pool.acquire(mine) == 0
        assert await pool.acquire(other) == 1
        waiting = asyncio.create_task(pool.acquire(mine))
        await settle()
        with pytest.raises(OverloadedError) as error:
            await pool.acquire(mine)
        assert error.value.reason == "SESSION_LIMIT"
        assert error.value.retry_after > 0
        waiting.cancel()
        await settle()
        pool.release(1)
        assert await pool.acquire(mine) == 1
        pool.release(0)
        assert await pool.acquire(mine) == 0

    asyncio.run(check())


@pytest.mark.parametrize("free", [True, False])
def test_no_slot_for_a_caller_whose_time_is_up(free):
    """Whose deadline has passed is refused at once, be a slot free or not."""

    async def check():
        pool = pool_of(1)
        if not free:
            await pool.acquire()
        with pytest.raises(OverloadedError) as error:
            await pool.acquire(within(-1.0))
        assert error.value.reason == "KV_SLOTS_EXHAUSTED"
        assert pool.in_use == (not free)

    asyncio.run(check())


def test_a_slot_passes_by_whose_time_is_up():
    """A slot that comes free after a waiter's deadline goes to the next one, even if nobody has told the waiter yet."""

    async def check():
        pool = pool_of(1)
        await pool.acquire()
        late = asyncio.create_task(pool.acquire(within(0.02)))
        patient = asyncio.create_task(pool.acquire())
        await settle()
        time.sleep(0.05)  # the loop is busy elsewhere  # noqa: ASYNC251
        pool.release(0)
        assert await patient == 0
        with pytest.raises(OverloadedError):
            await late

    asyncio.run(check())


def test_who_cannot_be_served_in_time_is_refused_at_once():
    """Behind a queue that takes longer than the caller has, by the shortest of the latest sessions, nobody waits."""

    async def check():
        pool = pool_of(1)
        for _ in range(3):
            slot = await pool.acquire()
            await asyncio.sleep(0.05)
            pool.release(slot)
        await pool.acquire()
        waiting = [asyncio.create_task(pool.acquire()) for _ in range(10)]
        await settle()
        with pytest.raises(OverloadedError) as error:
            # As far as it gets without waiting for anything.
            pool.acquire(within(0.4)).send(None)
        assert error.value.reason == "KV_SLOTS_EXHAUSTED"
        # Another client would have its turn in time.
        other = asyncio.create_task(pool.acquire(Caller("other", time.monotonic() + 0.4)))
        await settle()
        assert not other.done()
        for task in (*waiting, other):
            task.cancel()
        await asyncio.gather(*waiting, other, return_exceptions=True)

    asyncio.run(check())


def test_the_hint_when_to_come_back_follows_how_long_slots_are_held():
    """It is the time in which those who wait should have had their slots, by the sessions that ended lately."""

    async def hint(hold, waiting):
        pool = pool_of(1, max_waiting=waiting)
        slot = await pool.acquire()
        await asyncio.sleep(hold)
        pool.release(slot)
        await pool.acquire()
        tasks = [asyncio.create_task(pool.acquire()) for _ in range(waiting)]
        await settle()
        with pytest.raises(OverloadedError) as error:
            await pool.acquire()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return error.value.retry_after

    assert asyncio.run(hint(1.0, 0)) >= 1.0
    assert asyncio.run(hint(0.2, 4)) >= 5 * 0.2
    assert asyncio.run(hint(0.0, 0)) < 1.0
    assert asyncio.run(hint(0.2, 1000)) == 30.0


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["acquire", "release", "cancel", "settle"]), st.integers(0, 9)), max_size=40
)


@given(slots=st.integers(1, 3), max_waiting=st.integers(0, 4), max_sessions=st.sampled_from([0, 0, 2]), actions=ACTIONS)
def test_every_slot_has_one_owner(slots, max_waiting, max_sessions, actions):
    """Whatever is acquired, released and cancelled by whomever in any order, no slot has two owners, none is lost, and
    nobody is left waiting while a slot is free."""

    async def check():
        pool = pool_of(slots, max_waiting, max_sessions=max_sessions)
        tasks: deque[asyncio.Task[int]] = deque()
        owned: list[int] = []

        def collect():
            for task in [task for task in tasks if task.done()]:
                tasks.remove(task)
                if not task.cancelled() and task.exception() is None:
                    owned.append(task.result())

        for action, number in actions:
            if action == "acquire":
                tasks.append(asyncio.create_task(pool.acquire(Caller(str(number % 3)))))
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
        assert [await pool.acquire(Caller(str(slot))) for slot in range(slots)] == list(range(slots))

    asyncio.run(check())
