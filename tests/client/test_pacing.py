"""Laws of the draft length."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from specpair.calibration import Calibration
from specpair.pacing import FixedPacer, GoodputPacer, Round
from specpair.results import Source

LIMIT = 7


def judged(asked, accepted, draft_seconds, verify_seconds, proposed=None, confidence=()):
    """A round; all that was asked for was proposed unless it says otherwise."""
    proposed = asked if proposed is None else proposed
    return Round(1, Source.MODEL, asked, proposed, accepted, draft_seconds, verify_seconds, confidence)


def simulate(pacer, rounds, acceptance, draft_seconds, verify_seconds, seed=0, limit=LIMIT):
    """Lets a pacer work with a draft whose tokens are accepted with a probability; returns what it asked for."""
    rng = random.Random(seed)
    asked = []
    for _ in range(rounds):
        k = pacer.draft_length(limit)
        accepted = next((i for i in range(k) if rng.random() >= acceptance), k)
        pacer.observe(judged(k, accepted, draft_seconds(k) if k else 0.0, verify_seconds))
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
        pacer.observe(judged(k, k, 0.0, 0.01))


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
    assert pacer.min_confidence == 0.0


def test_plain_steps_that_hide_the_network_are_found_out():
    """Where proposals wait for a long way and plain steps do not, plain steps win, though many ids come true."""
    pacer, asked = GoodputPacer(), []
    for _ in range(300):
        k = pacer.draft_length(LIMIT)
        took = 0.06 if k else 0.006
        pacer.observe(replace(judged(k, min(k, 2), 0.05 if k else 0.0, took), forward_seconds=0.005))
        asked.append(k)
    assert sum(k > 0 for k in asked[100:]) <= 2
    # Nor are they believed to be so where they are not.
    pacer, asked = GoodputPacer(), []
    for _ in range(300):
        k = pacer.draft_length(LIMIT)
        pacer.observe(replace(judged(k, min(k, 2), 0.01 if k else 0.0, 0.06), forward_seconds=0.005))
        asked.append(k)
    assert median(asked) >= 2


def test_it_says_for_how_long_it_will_idle():
    """So many rounds more are plain ones, and then comes a probe."""
    pacer = GoodputPacer()
    simulate(pacer, 500, 0.0, lambda k: 0.005 * k, 0.01)
    while pacer.draft_length(LIMIT):
        pacer.observe(judged(1, 0, 0.005, 0.01))
    while rounds := pacer.idle():
        for _ in range(rounds):
            pacer.observe(judged(0, 0, 0.0, 0.01))
            idle = pacer.draft_length(LIMIT)
    assert idle > 0
    assert FixedPacer(0).idle() > 0 == FixedPacer(1).idle()


def test_one_pause_changes_little():
    """A round a hundred times as slow as the others does not end the speculation."""
    pacer = GoodputPacer()
    simulate(pacer, 10, 0.7, lambda k: 0.001 * k, 0.01)
    before = pacer.draft_length(LIMIT)
    pacer.observe(judged(before, 2, 0.5, 0.01))
    assert pacer.draft_length(LIMIT) >= 1


def unsure(pacer, rounds, draft_seconds, verify_seconds, believed=lambda sure: sure, seed=0):
    """Lets a pacer work with a draft that says how sure it is, of which `believed` comes true.

    Returns seconds and tokens.
    """
    rng = random.Random(seed)
    seconds, tokens, thresholds = 0.0, 0, []
    for _ in range(rounds):
        k, least = pacer.draft_length(LIMIT), pacer.min_confidence
        confidence, product, drafted = [], 1.0, 0
        while drafted < k:
            sure = rng.choice([0.1, 0.5, 0.9, 0.99])
            product *= sure
            drafted += 1
            if confidence and product < least:
                break
            confidence.append(sure)
        accepted = next((i for i, sure in enumerate(confidence) if rng.random() >= believed(sure)), len(confidence))
        given = tuple(confidence) if least else ()
        took = draft_seconds * drafted
        pacer.observe(judged(k, accepted, took, verify_seconds, len(confidence), given))
        seconds += took + verify_seconds
        tokens += accepted + 1
        thresholds.append(least)
    return seconds, tokens, thresholds


class Stubborn(GoodputPacer):
    """Does not let proposals end early."""

    min_confidence = 0.0


@pytest.mark.parametrize(("cost", "gain"), [(0.03, 1.0), (0.1, 1.02), (0.15, 1.02), (0.4, 0.98)])
def test_an_early_end_pays_where_drafting_is_dear(cost, gain):
    """With a draft that knows when it is unsure, ending early brings more tokens in the time, and never costs much."""
    rates = []
    for pacer in (GoodputPacer(), Stubborn()):
        seconds, tokens, _ = unsure(pacer, 3000, 0.01 * cost, 0.01)
        rates.append(tokens / seconds)
    assert rates[0] > gain * rates[1]


def test_a_cheap_draft_is_not_asked_how_sure_it_is():
    """To compute probabilities is not worth its while where one id more costs next to nothing."""
    _, _, thresholds = unsure(GoodputPacer(), 300, 1e-5, 0.01)
    assert set(thresholds) == {0.0}


def test_an_end_for_want_of_confidence_is_not_a_rejection():
    """What was not proposed was not refused: the acceptance of what is proposed stays what it is."""
    pacer = GoodputPacer()
    for _ in range(100):
        pacer.observe(judged(7, 2, 0.001, 0.01, 2, (0.9, 0.9)))
    pacer.observe(judged(7, 7, 0.001, 0.01, 7, (0.99,) * 7))
    assert pacer._pooled > 0.95
    short = GoodputPacer()
    for _ in range(100):
        short.observe(judged(7, 2, 0.001, 0.01, 2))
    assert short._pooled < 0.75


@pytest.mark.parametrize("power", [0.3, 1.0, 3.0])
def test_calibration_learns_what_confidence_is_worth(power):
    """Whether a draft is too sure or not sure enough, its word is taken for what came of it."""
    rng = random.Random(3)
    calibration = Calibration(keep=0.99)
    for _ in range(20000):
        sure = rng.random()
        calibration.observe((sure,), rng.random() < sure**power)
    for sure in (0.25, 0.45, 0.65, 0.85):
        assert calibration.probability(sure) == pytest.approx(sure**power, abs=0.12)
    for probability in (0.1, 0.3, 0.6):
        least = calibration.confidence_for(probability)
        assert 0.0 < least <= 0.9
        assert least == pytest.approx(min(max(probability ** (1 / power), 0.02), 0.9), abs=0.17)


def test_before_anything_is_known_confidence_is_taken_at_its_word():
    """The thresholds rise with what is asked for."""
    calibration = Calibration(keep=0.99)
    found = [calibration.confidence_for(probability) for probability in (0.0, 0.04, 0.18, 0.5, 0.99)]
    assert found == sorted(found)
    assert 0.0 < found[0] < 1e-20
    assert found[-1] == 0.9
