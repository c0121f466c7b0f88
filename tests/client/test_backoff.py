"""Laws of waiting for another try, with a clock that only the waits move."""

from __future__ import annotations

import asyncio
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpair import OverloadedError, UnavailableError
from specpair.backoff import Patience, Timing, delays

from .. import virtual_time
from .fakes import FakeTime

GONE = UnavailableError("gone")


def waited(patience, errors):
    """Waits for these failures one after the other; raises the one at which patience ends."""

    async def run():
        for error in errors:
            await patience.wait(error)

    virtual_time.run(run())


def test_delays_grow_up_to_two_seconds():
    """By 1.6 each time, as gRPC's."""
    found = list(islice(delays(lambda: 0.5), 10))
    assert found[:7] == pytest.approx([0.1 * 1.6**n for n in range(7)])
    assert found[7:] == [2.0, 2.0, 2.0]


@given(chances=st.lists(st.floats(0, 1, exclude_max=True), min_size=12, max_size=12))
def test_jitter_is_a_fifth_to_both_sides(chances):
    """Whatever chance says; and one delay's jitter does not move the next ones."""
    plain = islice(delays(lambda: 0.5), 12)
    for delay, middle in zip(islice(delays(iter(chances).__next__), 12), plain, strict=True):
        assert 0.8 * middle <= delay <= 1.2 * middle


def test_the_first_try_is_made_at_once():
    """The failures behind it wait, each longer than the one before."""
    time = FakeTime()
    waited(Patience(30.0, time.timing), [GONE] * 4)
    assert time.waits == pytest.approx([0.0, 0.1, 0.16, 0.256])


def test_progress_begins_anew():
    """Both the delays and the time that is left."""
    time = FakeTime()
    patience = Patience(1.0, time.timing)
    for _ in range(3):
        waited(patience, [GONE] * 5)
        assert patience.left < 0.1
        patience.progress()
        assert patience.left == 1.0
    assert time.waits == pytest.approx([0.0, 0.1, 0.16, 0.256, 0.4096] * 3)


@pytest.mark.parametrize("limit", [0.0, 0.05, 1.0, 30.0])
def test_it_ends_in_time(limit):
    """The failure is raised as soon as the next try would come too late; without any time there is none."""
    time = FakeTime()
    with pytest.raises(UnavailableError) as raised:
        waited(Patience(limit, time.timing), [GONE] * 1000)
    assert raised.value is GONE
    assert time.now <= limit
    assert (time.waits == []) == (limit == 0)


def test_a_running_one_waits_before_every_try():
    """Where the failure was a try itself."""
    time = FakeTime()
    patience = Patience(1.0, time.timing, running=True)
    time.now += 0.7
    waited(patience, [GONE])
    assert time.waits == pytest.approx([0.1])
    with pytest.raises(UnavailableError):
        waited(patience, [GONE, GONE])
    assert time.now <= 1.0


@pytest.mark.parametrize("error", [UnavailableError("x", retry_after=0.7), OverloadedError("x", retry_after=0.7)])
def test_a_hint_is_honoured(error):
    """Nobody is back before the time that the service names, nor earlier than without a hint."""
    time = FakeTime()
    waited(Patience(30.0, time.timing), [error, error, GONE, UnavailableError("x", retry_after=0.0), error, error])
    assert time.waits == pytest.approx([0.7, 0.7, 0.16, 0.256, 0.7, 0.7])


@pytest.mark.parametrize("hint", [2.0, 3600.0, float("inf")])
def test_a_hint_behind_the_end_is_the_end(hint):
    """It is not worth waiting for."""
    time = FakeTime()
    with pytest.raises(OverloadedError):
        waited(Patience(2.0, time.timing), [OverloadedError("full", retry_after=hint)])
    assert time.waits == []


def test_time_is_real_unless_it_is_given():
    """The default clock moves by itself, and chance has no pattern."""
    timing = Timing()

    async def work():
        begin = timing.clock()
        patience = Patience(1.0)
        for _ in range(3):
            await patience.wait(GONE)
        return timing.clock() - begin

    assert 0.8 * 0.26 <= virtual_time.run(work()) <= 1.2 * 0.26
    assert asyncio.run(work()) >= 0.8 * 0.26
    assert len({timing.chance() for _ in range(10)}) > 1
