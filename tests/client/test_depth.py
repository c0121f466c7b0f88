"""Laws of how many blocks go ahead of their verdicts."""

from __future__ import annotations

import random

import pytest

from specpair.depth import Depth
from specpair.meter import Trip
from specpair.pacing import Round
from specpair.results import Source


def settled(acceptance, network, *, length=5, draft=0.002, engine=0.006, rounds=400, depth=None):
    """How many blocks go ahead after so many rounds with these times, in seconds."""
    depth, rng = depth or Depth(), random.Random(0)
    for number in range(rounds):
        accepted = next((i for i in range(length) if rng.random() >= acceptance), length)
        guessed = accepted == length and rng.random() < acceptance if depth.blocks else None
        trip = Trip(draft, engine, engine + network)
        judged = Round(number, Source.MODEL, length, length, accepted, draft, engine + network, (), guessed)
        depth.observe(judged, trip, round(draft * 1e6))
    return depth.blocks


def test_none_where_it_cannot_help():
    """On a fast network blocks that seldom come true are not followed by others."""
    assert settled(0.5, 0.0005) == 0
    assert settled(0.0, 0.05) == 0


@pytest.mark.parametrize("network", [0.02, 0.05])
def test_some_over_a_long_way(network):
    """The longer the way, the more blocks are on it."""
    assert settled(0.9, network) >= 1
    assert settled(1.0, network) >= settled(1.0, 0.001)
    assert settled(1.0, network) >= min(int(network / 0.006), 8) - 1


def test_a_perfect_draft_works_while_the_target_does():
    """Also without a network, a draft as slow as the target is kept busy."""
    assert settled(1.0, 0.0, draft=0.006) >= 1


def test_it_ends_when_nothing_comes_true_any_more():
    """What was learnt is forgotten."""
    depth = Depth()
    assert settled(1.0, 0.05, depth=depth) >= 1
    assert settled(0.0, 0.05, depth=depth) == 0


def test_a_fixed_depth_stays():
    """Whatever is measured."""
    assert settled(0.0, 0.0, depth=Depth(3)) == 3
    assert settled(1.0, 0.1, depth=Depth(0)) == 0


def test_rounds_without_an_ask_teach_nothing():
    """Plain steps say nothing about what a proposal would have been worth."""
    depth = Depth()
    for number in range(100):
        depth.observe(Round(number, Source.TARGET, 0, 0, 0, 0.0, 0.06), Trip(0.0, 0.01, 0.06), 0)
    assert depth.blocks == 0


@pytest.mark.parametrize(("network", "steps"), [(0.0005, 1), (0.01, 1), (0.035, 4), (1.0, 24)])
def test_plain_steps_keep_the_target_at_work(network, steps):
    """As many go ahead as the target makes while one is on its way."""
    depth = Depth()
    for number in range(10):
        depth.observe(Round(number, Source.TARGET, 0, 0, 0, 0.0, 0.0), Trip(0.0, 0.01, 0.01 + network), 0)
    assert depth.steps == steps
    assert Depth(0).steps == 0
