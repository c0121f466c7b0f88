"""Laws of the circuit breaker, and of the task that looks after a lost draft service. Time is simulated."""

from __future__ import annotations

import asyncio
import gc
import logging
from dataclasses import replace

import pytest

from specpair.breaker import Breaker, State
from specpair.compatibility import Pairing
from specpair.errors import UnavailableError, UnsupportedError
from specpair.messages import Phase
from specpair.recovery import Recovery

from .. import virtual_time
from .fakes import FINGERPRINT, FakeTarget
from .flaky import FlakyDraft


class Clock:
    """Seconds that pass when somebody sleeps."""

    def __init__(self):
        self.seconds = 100.0
        self.sleeps = []

    def __call__(self):
        return self.seconds

    async def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.seconds += seconds
        await asyncio.sleep(0)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    """Without chance."""
    return Breaker(now=clock, chance=lambda: 0.5)


@pytest.fixture
def log(caplog):
    """Levels of what was logged so far."""
    caplog.set_level(logging.INFO, "specpair")
    return lambda: [record.levelname for record in caplog.records]


def nobody(reason):
    pass


def bring_back(breaker):
    """From open to closed."""
    breaker.admit()
    permit = breaker.enter(nobody)
    permit.began()
    permit.release()


def test_a_loss_takes_every_permit_and_is_logged_once(breaker, log):
    """Whoever loses the service tells all others; what they say about it afterwards changes nothing."""
    told = []
    permits = [breaker.enter(told.append) for _ in range(3)]
    permits[1].failed("gone")
    for permit in permits:
        permit.failed("gone too")
    assert (breaker.state, breaker.reason, told) == (State.OPEN, "gone", ["gone"] * 3)
    assert breaker.enter(nobody) is None
    assert (breaker.losses, breaker.returns, log()) == (1, 0, ["WARNING"])


def test_one_session_tries_and_its_success_closes(breaker, log):
    """Half-open, the first that comes tries; the others are let in when it has succeeded."""
    breaker.lose("gone")
    breaker.admit()
    trial = breaker.enter(nobody)
    assert trial.trial
    assert breaker.enter(nobody) is None
    trial.began()
    assert (breaker.state, trial.trial, breaker.enter(nobody).trial) == (State.CLOSED, False, False)
    assert (breaker.losses, breaker.returns, log()) == (1, 1, ["WARNING", "INFO"])


def test_a_trial_that_fails_opens_again_without_another_line_in_the_log(breaker, log):
    """It was no return, so it is no loss."""
    breaker.lose("gone")
    breaker.admit()
    breaker.enter(nobody).failed("nonsense")
    assert (breaker.state, breaker.reason, breaker.losses, log()) == (State.OPEN, "nonsense", 1, ["WARNING"])


@pytest.mark.parametrize("drop", [lambda permit: permit.release(), lambda permit: None])
def test_a_trial_without_an_end_passes_to_the_next_session(breaker, drop):
    """The session that tried was given up, or nobody holds it any more."""
    breaker.lose("gone")
    breaker.admit()
    drop(breaker.enter(nobody))
    gc.collect()
    assert breaker.enter(nobody).trial


def test_a_late_word_about_an_earlier_life_is_not_heard(breaker):
    """A session that failed with the lost service does not open the breaker for the one that is back."""
    old = breaker.enter(nobody)
    breaker.lose("gone")
    bring_back(breaker)
    old.failed("gone")
    assert breaker.state is State.CLOSED


def test_the_cooldown_doubles_for_a_service_that_is_lost_again_and_again(breaker, clock):
    """None after the first loss, half a second after the next, 30 s at most."""
    waits = []
    for _ in range(10):
        breaker.lose("nonsense")
        waits.append(breaker.wait)
        clock.seconds += breaker.wait
        bring_back(breaker)
    assert waits == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_trials_that_fail_and_refusals_double_it_too(breaker, clock):
    """Whether it was let in or not: a service that is healthy and of no use is asked less and less."""
    breaker.lose("nonsense")
    waits = []
    for n in range(6):
        clock.seconds += breaker.wait
        if n % 2:
            breaker.refuse("another vocabulary")
        else:
            breaker.admit()
            breaker.enter(nobody).failed("nonsense")
        waits.append(breaker.wait)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]


def test_a_service_that_has_proved_itself_starts_anew(breaker, clock):
    """After 5 s of use, or four times the last cooldown, a loss is a first loss."""
    for used, expected in (
        (0.0, 0.0),
        (4.9, 0.5),
        (4.9, 1.0),
        (5.1, 0.0),
        (1.0, 0.5),
        (1.0, 1.0),
        (1.0, 2.0),
        (7.9, 4.0),
    ):
        clock.seconds += used
        breaker.lose("gone")
        assert breaker.wait == pytest.approx(expected)
        clock.seconds += breaker.wait
        bring_back(breaker)
    clock.seconds += 16.1
    breaker.lose("gone")
    assert breaker.wait == 0.0


@pytest.mark.parametrize("chance", [0.0, 0.3, 1.0])
def test_the_cooldown_varies_by_a_quarter(clock, chance):
    """So that clients which lost a service together do not return together."""
    breaker = Breaker(now=clock, chance=lambda: chance)
    breaker.lose("gone")
    bring_back(breaker)
    breaker.lose("gone")
    assert breaker.wait == pytest.approx(0.5 * (0.75 + 0.5 * chance))


def test_doubt_is_shared_and_ends_with_a_session_that_begins_well(breaker):
    """Others need not wait for what one has waited for in vain."""
    first, second = breaker.enter(nobody), breaker.enter(nobody)
    first.late()
    assert second.doubtful
    second.began()
    assert not first.doubtful


def test_who_is_alone_with_its_failure(breaker, clock):
    """A session is, if another one got an answer since it began to wait; its own answers do not count."""
    mine, other = breaker.enter(nobody), breaker.enter(nobody)
    since = clock()
    mine.answered()
    assert not mine.alone(since)
    clock.seconds += 1.0
    other.answered()
    assert mine.alone(since)
    assert not mine.alone(clock() + 0.1)


class Watched:
    """A draft service, its breaker and the task that looks after it, on simulated time."""

    def __init__(self, clock, **draft):
        self.target, self.draft = FakeTarget(), FlakyDraft(**draft)
        self.breaker = Breaker(now=clock, chance=lambda: 0.5)
        self.recovery = Recovery(Pairing(self.target, self.draft, within=0.01), self.breaker, sleep=clock.sleep)

    async def until(self, condition, steps=2000):
        """Lets the task run while sessions want the service."""
        for _ in range(steps):
            if condition():
                return
            self.recovery.want()
            await asyncio.sleep(0)
        raise AssertionError("it never came to that")


def test_a_lost_service_is_asked_until_it_is_healthy(clock):
    """First after 0.2 s, then every half second at most; serving again and fitting, it may be tried."""

    async def run():
        watched = Watched(clock, state="down")
        watched.breaker.lose("gone")
        assert watched.recovery.enter(nobody) is None
        await watched.until(lambda: watched.draft.healths >= 5)
        watched.draft.wake()
        await watched.until(lambda: watched.breaker.state is State.HALF_OPEN)
        assert watched.recovery.enter(nobody).trial
        await watched.recovery.aclose()
        return watched

    watched = virtual_time.run(run())
    assert clock.sleeps[:5] == [0.2, 0.4, 0.5, 0.5, 0.5]
    assert watched.target.infos == watched.draft.infos == 1


def test_a_closed_breaker_asks_nobody(clock):
    """There is no task while the service is in use."""

    async def run():
        watched = Watched(clock)
        assert watched.recovery.enter(nobody) is not None
        watched.recovery.want()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return watched.draft.healths

    assert virtual_time.run(run()) == 0


def test_it_ends_when_nobody_wants_the_service_and_begins_again(clock):
    """An idle client asks nobody; the next session does."""

    async def run():
        watched = Watched(clock, state="down")
        watched.breaker.lose("gone")
        watched.recovery.want()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
        asked, slept = watched.draft.healths, sum(clock.sleeps)
        watched.recovery.want()
        await watched.until(lambda: watched.draft.healths > asked)
        await watched.recovery.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        watched.recovery.want()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return slept

    assert 5.0 <= virtual_time.run(run()) <= 6.0


def test_an_event_loop_may_end_without_it(clock):
    """A client that was never closed keeps no program from ending, and leaves no warning."""

    async def run():
        watched = Watched(clock, state="down")
        watched.breaker.lose("gone")
        watched.recovery.want()

    virtual_time.run(run())
    gc.collect()


def test_what_came_back_is_compared_again(clock, log):
    """Another draft at the address is refused, and asked again after a while, for it may be replaced in turn."""

    async def run():
        watched = Watched(clock)
        assert (await watched.recovery.pairing.check()).refusal == ""
        watched.breaker.lose("gone")
        watched.draft.fingerprint = replace(FINGERPRINT, vocabulary_size=51)
        await watched.until(lambda: watched.draft.infos >= 5)
        assert watched.breaker.state is State.OPEN
        assert "draft.fingerprint.vocabulary_size" in watched.breaker.reason
        watched.draft.fingerprint = FINGERPRINT
        await watched.until(lambda: watched.breaker.state is State.HALF_OPEN)
        await watched.recovery.aclose()
        return watched

    watched = virtual_time.run(run())
    assert watched.recovery.pairing.mismatch is None, "a draft that took the place of one that fitted is no error"
    assert log() == ["WARNING", "WARNING"]
    assert watched.target.infos == 1
    assert max(clock.sleeps) == pytest.approx(4.0)


def test_a_cooldown_is_slept_through(clock):
    """A service that is healthy is not asked what it is before its cooldown is over."""

    async def run():
        watched = Watched(clock)
        for _ in range(4):
            watched.breaker.lose("nonsense")
            bring_back(watched.breaker)
        watched.breaker.lose("nonsense")
        began = clock()
        await watched.until(lambda: watched.breaker.state is State.HALF_OPEN)
        await watched.recovery.aclose()
        return clock() - began

    assert virtual_time.run(run()) == pytest.approx(4.0)


def test_a_service_that_is_not_ready_or_has_no_health_service(clock):
    """A phase other than ready holds it back; that it does not know the question for its health does not."""

    async def run():
        watched = Watched(clock)

        async def unknown(within=None):
            raise UnsupportedError("no such method")

        watched.draft.healthy = unknown
        watched.draft.phase = Phase.LOADING
        watched.breaker.lose("gone")
        await watched.until(lambda: watched.draft.infos >= 2)
        assert watched.breaker.state is State.OPEN
        assert watched.breaker.reason.startswith("draft not ready: loading")
        watched.draft.phase = Phase.READY
        await watched.until(lambda: watched.breaker.state is State.HALF_OPEN)
        await watched.recovery.aclose()

    virtual_time.run(run())


def test_a_target_that_fails_meanwhile_is_not_the_drafts_fault(clock):
    """As long as the target cannot say what it runs the draft waits."""

    async def run():
        watched = Watched(clock)
        watched.target.failure = UnavailableError("gone")
        watched.breaker.lose("gone")
        await watched.until(lambda: watched.target.infos >= 3)
        assert watched.breaker.state is State.OPEN
        watched.target.failure = None
        await watched.until(lambda: watched.breaker.state is State.HALF_OPEN)
        await watched.recovery.aclose()

    virtual_time.run(run())


def test_who_compares_at_the_same_time_asks_once():
    """Sessions that begin together wait for one answer, and one that is given up takes it from nobody."""

    async def run():
        target, draft = FakeTarget(), FlakyDraft(state="hung")
        pairing = Pairing(target, draft, within=5.0)
        waiting = [asyncio.create_task(pairing.check()) for _ in range(3)]
        await asyncio.sleep(0.01)
        waiting[0].cancel()
        draft.wake()
        assert [(await one).refusal for one in waiting[1:]] == ["", ""]
        return target.infos, draft.infos

    assert virtual_time.run(run()) == (1, 1)
