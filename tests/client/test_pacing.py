"""Laws of the draft length."""

from __future__ import annotations

import random

import pytest

from specpair.pacing import FixedPacer, GoodputPacer, Round

LIMIT = 7


def simulate(pacer, rounds, acceptance, draft_seconds, verify_seconds, seed=0, limit=LIMIT):
    """Lets a pacer work with a draft whose tokens are accepted with a probability; returns what it asked for."""
    rng = random.Random(seed)
    asked = []
    for _ in range(rounds):
        k = pacer.draft_length(limit)
        accepted = next((i for i in range(k) if rng.random() >= acceptance), k)
        pacer.observe(Round(k, accepted, draft_seconds(k) if k else 0.0, verify_seconds))
        asked.append(k)
    return asked


def goodput(k, acceptance, draft_seconds, verify_seconds):
    """Leviathan et al. 2023, equation 1, over the time of a round."""
    expected = sum(acceptance**i for i in range(k + 1))
    return expected / ((draft_seconds(k) if k else 0.0) + verify_seconds)


def median(values):
    return sorted(values)[len(values) // 2]


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("cost", [0.0, 0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("overhead", [0.0, 0.2])
def test_settles_within_a_few_percent_of_the_best_length(acceptance, cost, overhead):
    """For a constant acceptance rate, the goodput of the settled length is close to that of the best one."""

    def draft_seconds(k):
        return 0.01 * (overhead + cost * k)

    asked = simulate(GoodputPacer(), 600, acceptance, draft_seconds, 0.01)[200:]
    best = max(goodput(k, acceptance, draft_seconds, 0.01) for k in range(LIMIT + 1))
    settled = sum(goodput(k, acceptance, draft_seconds, 0.01) for k in asked) / len(asked)
    assert settled >= 0.93 * best


@pytest.mark.parametrize("cost", [0.05, 0.1, 0.5, 3.0])
def test_a_useless_draft_costs_next_to_nothing(cost):
    """With acceptance 0 the draft takes less than 2% of the time, but is never given up."""
    asked = simulate(GoodputPacer(), 3000, 0.0, lambda k: 0.01 * cost * k, 0.01)
    assert sum(cost * k for k in asked[1000:]) < 0.02 * 2000
    assert any(asked[1000:])


def test_a_draft_that_recovers_is_used_again():
    """After a useless stretch a good one is found out by the probes."""
    pacer = GoodputPacer()
    assert median(simulate(pacer, 500, 0.0, lambda k: 0.001 * k, 0.01)) == 0
    assert median(simulate(pacer, 500, 1.0, lambda k: 0.001 * k, 0.01)[-100:]) == LIMIT


def test_a_slow_way_to_the_target_makes_longer_proposals():
    """The longer a round takes, the more it should bring."""
    near = simulate(GoodputPacer(), 400, 0.7, lambda k: 0.002 * k, 0.01)[200:]
    far = simulate(GoodputPacer(), 400, 0.7, lambda k: 0.002 * k, 0.06)[200:]
    assert sum(far) > sum(near)


def test_the_first_lengths_are_tried_before_anything_is_known():
    """Without an observation the start length is asked for, as far as the limit allows."""
    pacer = GoodputPacer(start=4)
    assert [pacer.draft_length(limit) for limit in (7, 4, 2, 0)] == [4, 4, 2, 0]


def test_the_limit_holds():
    """Never more than allowed, whatever was measured."""
    rng = random.Random(1)
    pacer = GoodputPacer()
    for _ in range(500):
        limit = rng.randrange(0, 9)
        k = pacer.draft_length(limit)
        assert 0 <= k <= limit
        pacer.observe(Round(k, k, 0.0, 0.01))


def test_the_same_observations_give_the_same_lengths():
    """No clock and no randomness inside."""
    runs = [simulate(GoodputPacer(), 300, 0.6, lambda k: 0.001 * k, 0.01, seed=3) for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_clock_that_stands_still_does_no_harm():
    """Durations of 0 divide nothing by nothing."""
    assert all(0 <= k <= LIMIT for k in simulate(GoodputPacer(), 100, 0.5, lambda k: 0.0, 0.0))


def test_a_fixed_length_stays():
    """A fixed pacer learns nothing."""
    pacer = FixedPacer(3)
    assert set(simulate(pacer, 50, 0.0, lambda k: 1.0, 0.01)) == {3}
    assert pacer.draft_length(2) == 2
