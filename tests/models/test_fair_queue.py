"""The fair queue: owners take turns, an owner's items keep their order, and nothing is lost or invented."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpair_runtime.fair_queue import FairQueue

OWNERS = st.sampled_from("abc")
PUSHES = st.lists(OWNERS, max_size=20)


def filled(owners):
    queue = FairQueue()
    for number, owner in enumerate(owners):
        queue.push(owner, (owner, number))
    return queue


@given(PUSHES)
def test_everything_comes_out_once_and_in_order(owners):
    """Each owner's items come in order, and all of them come."""
    queue = filled(owners)
    items = [queue.pop() for _ in owners]
    assert sorted(items, key=lambda item: item[1]) == [(owner, number) for number, owner in enumerate(owners)]
    for owner in set(owners):
        numbers = [number for whose, number in items if whose == owner]
        assert all(first < second for first, second in pairwise(numbers))
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.pop()


@given(PUSHES)
def test_nobody_gets_two_turns_while_another_waits(owners):
    """Between two items of one owner there is one of each other owner that still has some."""
    queue = filled(owners)
    items = [queue.pop()[0] for _ in owners]
    for start, owner in enumerate(items):
        if owner in items[start + 1 :]:
            end = items.index(owner, start + 1)
            assert set(items[start + 1 : end]) >= set(items[end:]) - {owner}


@given(PUSHES, st.integers(0, 20), OWNERS)
def test_who_is_ahead(owners, popped, newcomer):
    """What is said to be ahead of a further item is what comes before it."""
    queue = filled(owners)
    for _ in range(min(popped, len(owners))):
        queue.pop()
    ahead = queue.ahead(newcomer)
    queue.push(newcomer, "new")
    items = [queue.pop() for _ in range(len(queue))]
    assert items.index("new") == ahead


@given(PUSHES, OWNERS)
def test_who_crowds(owners, newcomer):
    """Somebody crowds exactly if taking their newest item for one of the newcomer leaves them at least as many."""
    queue = filled(owners)
    crowding = queue.crowded_by(newcomer)
    most = max(map(queue.count, "abc"))
    assert (crowding is not None) == (most - 1 >= queue.count(newcomer) + 1)
    if crowding is not None:
        assert queue.count(crowding) == most
        assert queue.pop_newest(crowding)[1] == max(number for number, owner in enumerate(owners) if owner == crowding)
        assert queue.count(crowding) == most - 1


def test_removing():
    """An item that left is not served; removing what is not there does nothing."""
    queue = filled("aab")
    queue.remove("a", ("a", 0))
    queue.remove("b", ("b", 2))
    queue.remove("c", ("c", 3))
    assert len(queue) == 1
    assert queue.pop() == ("a", 1)
