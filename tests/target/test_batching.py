"""Who computes when: counted in steps and chunks on a model that computes nothing."""

from __future__ import annotations

import threading
from itertools import groupby

import pytest

from specpair_target.blocks import Block
from specpair_target.gathering import Gathering, StepTimes
from specpair_target.lanes import Lane, Waiting
from specpair_target.prefills import Prefills

from .fake_engine import BORDER, CHUNK, WIDTH, FakeVerifier, fake_scheduler, fake_session

MANY = 60


@pytest.fixture
def start():
    """Starts schedulers, which stop with the test: `start(scheduler)`."""
    started = []

    def begin(scheduler):
        started.append(scheduler)
        scheduler.start()

    yield begin
    for scheduler in started:
        scheduler.stop()


def always_ready(scheduler, session, steps=MANY):
    """Queues so many plain steps of a session; returns the last answer to come."""
    scheduler.prefill(session)
    return [scheduler.submit(session, Block()) for _ in range(steps)][-1]


def runs_of_chunks(events):
    """How many chunks stand between one step and the next, from the first chunk to the last."""
    kinds = [event[0] for event in events]
    between = kinds[kinds.index("chunk") : len(kinds) - kinds[::-1].index("chunk")]
    return [len(list(run)) for kind, run in groupby(between) if kind == "chunk"]


# --- steps -----------------------------------------------------------------------------------------------------------


def test_a_new_session_joins_the_next_step(start):
    """Sessions that come while a step runs are part of the one behind it, whatever else waits."""
    verifier = FakeVerifier(gate=threading.Semaphore(0))
    scheduler = fake_scheduler(verifier)
    first = always_ready(scheduler, fake_session(0, 1), 3)
    start(scheduler)
    assert verifier.reached.wait(30)
    joining = [always_ready(scheduler, fake_session(slot, 1), 1) for slot in (1, 2)]
    verifier.gate.release(3)
    assert [answer.result(30).batch_sessions for answer in (*joining, first)] == [3, 3, 1]
    assert verifier.events == [("step", 0), ("step", 0, 1, 2), ("step", 0)]


def test_lengths_take_turns(start):
    """Sessions that attend to different lengths do not share a step, and step by turns: many short ones do not hold
    back a long one, nor the other way round."""
    verifier = FakeVerifier()
    scheduler = fake_scheduler(verifier)
    long = fake_session(5, BORDER + 1)
    long.kv_length = BORDER
    last = [always_ready(scheduler, fake_session(slot, 1), 20) for slot in range(5)]
    last.append(always_ready(scheduler, long, 20))
    start(scheduler)
    for answer in last:
        answer.result(30)
    assert verifier.events == [("step", 0, 1, 2, 3, 4), ("step", 5)] * 20


def test_a_session_steps_without_a_pause(start):
    """Blocks that wait behind each other ride in one step after the other, and each is answered."""
    verifier = FakeVerifier()
    scheduler = fake_scheduler(verifier)
    session = fake_session(0, 1)
    answers = [scheduler.submit(session, Block([n, n + 1], n, n - 1)) for n in range(1, 31, 3)]
    start(scheduler)
    verdicts = [answer.result(30) for answer in answers]
    assert [verdict.base_length for verdict in verdicts] == list(range(1, 31, 3))
    assert verifier.events == [("step", 0)] * len(answers)


# --- prefill ---------------------------------------------------------------------------------------------------------


def test_a_prompt_alone_is_prefilled_at_once(start):
    """Nobody steps: chunk follows chunk, and the session's own first step comes right behind the last."""
    verifier = FakeVerifier()
    scheduler = fake_scheduler(verifier)
    answer = always_ready(scheduler, fake_session(0, 10 * CHUNK + 1), 1)
    start(scheduler)
    answer.result(30)
    assert verifier.events == [("chunk", 0)] * 10 + [("step", 0)]


@pytest.mark.parametrize(
    ("step_tokens", "sessions", "share"),
    [
        (CHUNK + WIDTH, 1, 1.0),
        (CHUNK // 2 + WIDTH, 1, 0.5),
        (2 * CHUNK + WIDTH, 1, 2.0),
        (CHUNK + 4 * WIDTH, 4, 1.0),
        (CHUNK + WIDTH, 4, 0.3125),  # what the steps leave is less than a quarter
    ],
)
def test_prompts_and_steps_share_the_engine_by_the_budget(start, step_tokens, sessions, share):
    """Per step so many chunks as its rows leave of the budget, never fewer than a quarter of the budget pays for; and
    never more between two steps than the budget and what it could not pay before."""
    verifier = FakeVerifier()
    scheduler = fake_scheduler(verifier, step_tokens=step_tokens)
    for slot in range(sessions):
        always_ready(scheduler, fake_session(slot, 1))
    answer = always_ready(scheduler, fake_session(sessions, 12 * CHUNK + 1), 1)
    start(scheduler)
    answer.result(30)
    runs = runs_of_chunks(verifier.events)
    assert max(runs) <= max(1, share)
    kinds = [event[0] for event in verifier.events]
    steps = kinds[: len(kinds) - kinds[::-1].index("chunk")].count("step")
    assert steps == pytest.approx(12 / share, abs=1.5)


def test_a_short_prompt_passes_a_long_one(start):
    """A short prompt that comes while a long one is prefilled is done after its own chunks."""
    verifier = FakeVerifier(gate=threading.Semaphore(0))
    scheduler = fake_scheduler(verifier)
    long = always_ready(scheduler, fake_session(0, 12 * CHUNK + 1), 1)
    short = always_ready(scheduler, fake_session(1, 2 * CHUNK + 1), 1)
    start(scheduler)
    assert verifier.reached.wait(30)
    assert verifier.events == [("chunk", 1)] * 2
    verifier.gate.release(2)
    assert short.result(30).batch_sessions == long.result(30).batch_sessions == 1


def prefill_all(prefills):
    """Computes everything; whose chunks those were."""
    order = []
    while (session := prefills.first()) is not None:
        order.append(session.slot)
        advance(prefills, session)
    return order


def advance(prefills, session):
    session.kv_length = min(session.kv_length + CHUNK, session.prompt_length - 1)
    prefills.computed()


def test_a_long_prompt_is_not_passed_for_ever():
    """However many short prompts keep coming, a long one is passed only as long as it takes itself: with a newcomer of
    one chunk before every chunk, a prompt of ten is done after the ten before it, and ten of its own."""
    prefills = Prefills(CHUNK)
    long = fake_session(0, 10 * CHUNK + 1)
    prefills.add(long)
    served = []
    while not long.prefilled:
        prefills.add(fake_session(len(served) + 1, CHUNK + 1))
        session = prefills.first()
        served.append(session.slot)
        advance(prefills, session)
    assert served == [*range(1, 11), *[0] * 10] or served == [*range(1, 10), *[0] * 10]


def test_equal_prompts_in_order_of_arrival():
    """Of prompts that are alike the first comes first, and closed, failed and finished ones are forgotten."""
    prefills = Prefills(CHUNK)
    sessions = [fake_session(slot, 2 * CHUNK + 1) for slot in range(4)]
    for session in sessions:
        prefills.add(session)
    sessions[1].closed = True
    sessions[2].failure = RuntimeError()
    assert prefill_all(prefills) == [0, 0, 3, 3]
    assert prefills.first() is None


# --- gathering -------------------------------------------------------------------------------------------------------

FIXED = 3_000_000
STEP = 8_000_000
TURNAROUND = 1_000_000


def answered_lane(at, turnaround=TURNAROUND):
    """A lane that was answered then, of a session that always took so long to come back."""
    lane = Lane(fake_session(0, 1))
    lane.answered_ns, lane.turnaround_ns = at, turnaround
    return lane


def ready_lane(at):
    lane = Lane(fake_session(1, 1))
    lane.ready_ns = at
    return lane


@pytest.fixture
def gathering():
    """Steps took FIXED and a part that grows with the slots; the last one ended at STEP."""
    gathering = Gathering()
    for slots in (1, 4, 2, 8):
        gathering.stepped(slots, STEP - FIXED - slots * 100_000, STEP)
    return gathering


def test_the_fixed_part_of_a_step_is_learned():
    """The intercept of times by slots, however the numbers of slots follow each other, and from changed times anew;
    half of a step before there was any difference."""
    times = StepTimes()
    for _ in range(3):
        times.stepped(4, 10_000)
    assert times.fixed_ns == pytest.approx(5_000)
    for fixed in (3_000, 7_000):
        for slots in [1, 2, 2, 8, 4, 1, 16] * 30:
            times.stepped(slots, fixed + 500 * slots)
        assert times.fixed_ns == pytest.approx(fixed, rel=0.01)


def test_a_step_waits_for_all_who_come_back_soon(gathering):
    """Until the last of them is expected, if that is within the fixed part of a step from when it could begin."""
    away = [answered_lane(STEP), answered_lane(STEP + 300)]
    assert gathering.wait_ns(away, [ready_lane(STEP + 100)], STEP + 200) == TURNAROUND + 100
    assert gathering.wait_ns([], [ready_lane(STEP + 100)], STEP + 200) == 0


def test_a_step_waits_for_nobody_if_one_comes_late(gathering):
    """One who takes longer than the fixed part of a step, should have been there already, or is unknown: then those
    who are ready begin."""
    late, slow, unknown = (answered_lane(STEP) for _ in range(3))
    late.answered_ns, slow.turnaround_ns, unknown.turnaround_ns = STEP - 2 * TURNAROUND, 1.1 * FIXED, None
    for lane in (late, slow, unknown):
        assert gathering.wait_ns([answered_lane(STEP), lane], [ready_lane(STEP)], STEP + 200) == 0


def test_the_wait_is_counted_from_when_a_step_could_begin(gathering):
    """However many keep coming, who is ready waits no longer than the fixed part of a step."""
    ready, at = ready_lane(STEP - 500), STEP + FIXED - TURNAROUND
    assert gathering.wait_ns([answered_lane(at - 1000)], [ready], at) == TURNAROUND - 1000
    assert gathering.wait_ns([answered_lane(at + 1000)], [ready], at + 1000) == 0


def test_who_is_away():
    """A session between an answer and its next block, unless its turn has ended or it is closed."""
    lane = answered_lane(STEP)
    assert lane.away
    lane.push(Waiting(Block(), None, STEP + 1))
    assert not lane.away
    for field in ("finish_reason", "closed"):
        lane = answered_lane(STEP)
        setattr(lane.session, field, 1)
        assert not lane.away


def test_how_long_a_session_takes_is_learned():
    """From an answer to the next block; steadier sessions are expected more sharply; another turn's pause says
    nothing."""
    lane = Lane(fake_session(0, 1))
    for at in range(0, 100 * TURNAROUND, 2 * TURNAROUND):
        lane.answered_ns = at
        lane.push(Waiting(Block(), None, at + TURNAROUND))
        lane.blocks.clear()
    assert lane.turnaround_ns == pytest.approx(TURNAROUND)
    lane.answered_ns = 0
    assert TURNAROUND <= lane.expected_ns < 1.01 * TURNAROUND
    lane.rest()
    assert lane.expected_ns is None
    lane.push(Waiting(Block(), None, 10**12))
    assert lane.turnaround_ns == pytest.approx(TURNAROUND)
