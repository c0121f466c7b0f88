"""The engine thread: whose turn it is, and what one session's misfortune means to the others."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError

import pytest
import torch

from specpair.errors import InternalError, OverloadedError, UnavailableError
from specpair_target.blocks import Block
from specpair_target.scheduler import Scheduler
from specpair_target.sessions import Session
from specpair_target.verifier import Verifier

from ..tiny import VOCABULARY, random_ids
from .driving import PROPOSERS, greedy, nobody, open_session, run, slot_bits, speak, together

NEW = 12
CHUNK = 32
LONG = random_ids(10 * CHUNK)
PROMPTS = [random_ids(length, seed=5) for length in (1, 9, 40, 70)]


@pytest.fixture
def engine(load):
    """An engine of its own for tests that interfere with it."""
    return load("llama", slots=4)


@pytest.fixture
def truths(tiny):
    """What `generate` says to PROMPTS."""
    return [tiny.reference("llama").greedy(prompt, NEW) for prompt in PROMPTS]


def new_session(slot, prompt):
    return Session(
        id=str(slot),
        tokens=list(prompt),
        prompt_length=len(prompt),
        max_length=384,
        options=greedy(),
        text=None,
        slot=slot,
    )


class Gate:
    """Stops the engine thread in front of a call until it is opened."""

    def __init__(self, monkeypatch, owner, name):
        self._inner = getattr(owner, name)
        self.reached, self._open = threading.Event(), threading.Event()
        monkeypatch.setattr(owner, name, self)

    def __call__(self, *args):
        self.reached.set()
        assert self._open.wait(30)
        return self._inner(*args)

    def open(self):
        self._open.set()


# --- turns -----------------------------------------------------------------------------------------------------------


def test_prefill_and_steps_take_turns(load, monkeypatch):
    """While a long prompt is prefilled a running session gets a step after every chunk, where the budget is a chunk
    and a step, and the chunks go on while that session always has a block in the queue."""
    engine = load("llama", slots=4, step_tokens=CHUNK + 8)
    scheduler, runner = engine._scheduler, engine.model.runner
    running, arriving = new_session(0, PROMPTS[1]), new_session(1, LONG)
    scheduler.prefill(running)
    events, answers = [], [scheduler.submit(running, Block())]
    answers[0].result(30)
    prefill, logits = runner.prefill, runner.logits

    def chunk(*args):
        events.append("chunk")
        answers[-1].result(0)
        answers.append(scheduler.submit(running, Block()))
        return prefill(*args)

    def step(*args):
        events.append("step")
        return logits(*args)

    monkeypatch.setattr(runner, "prefill", chunk)
    monkeypatch.setattr(runner, "logits", step)
    scheduler.prefill(arriving)
    scheduler.submit(arriving, Block()).result(30)
    # The last chunk and the arriving session's own first step may be followed by one step for both.
    assert events[: 2 * 10] == ["chunk", "step"] * 10


def test_blocks_that_wait_share_a_step(engine, monkeypatch, tiny):
    """Blocks that arrive while the engine is busy go into one step together."""
    gate = Gate(monkeypatch, engine.model.runner, "logits")
    sessions = [new_session(slot, random_ids(1, seed=slot)) for slot in range(4)]
    first = engine._scheduler.submit(sessions[0], Block())
    assert gate.reached.wait(30)
    others = [engine._scheduler.submit(session, Block()) for session in sessions[1:]]
    gate.open()
    verifications = [answer.result(30) for answer in (first, *others)]
    assert [one.batch_sessions for one in verifications] == [1, 3, 3, 3]
    reference = tiny.reference("llama")
    for session, one in zip(sessions, verifications, strict=True):
        assert one.judgement.token_ids == reference.greedy(session.tokens[:1], 1)


def test_a_session_that_waits_for_its_prefill_lets_others_pass(engine, truths):
    """Short sessions that come after a long prompt are done while it is still being prefilled or soon after, and
    everybody gets what they would get alone."""
    long = run(speak(engine, LONG, greedy(NEW)))
    outputs = together(speak(engine, LONG, greedy(NEW)), *(speak(engine, prompt, greedy(NEW)) for prompt in PROMPTS))
    assert [output.token_ids for output in outputs] == [long.token_ids, *truths]


def test_a_round_costs_one_step(engine, monkeypatch, truths):
    """Whatever is accepted or rejected, a session that has its prompt in the cache needs one forward pass a round."""
    steps = []
    logits = engine.model.runner.logits
    monkeypatch.setattr(engine.model.runner, "logits", lambda *args: steps.append(args) or logits(*args))
    for proposer in PROPOSERS.values():
        for prompt, truth in zip(PROMPTS, truths, strict=True):
            output = run(speak(engine, prompt, greedy(NEW), proposer([*prompt, *truth])))
            assert len(steps) == output.rounds
            steps.clear()


def test_every_position_is_judged_over_its_own_length(engine, monkeypatch, tiny):
    """Blocks across the border of two attended lengths are cut there, proposals and replayed tokens alike: which length
    a position is computed with does not depend on the block that it comes in."""
    prompt = random_ids(240, seed=5)
    truth = tiny.reference("llama").greedy(prompt, 30)
    runner, verifier = engine.model.runner, engine._scheduler._verifier
    verify, seen = verifier.verify, []

    def spy(first_slot, rows, length):
        for row in rows:
            if row.start != runner.parking:
                seen.extend((position, length) for position in range(row.start, row.start + len(row.token_ids)))
        return verify(first_slot, rows, length)

    monkeypatch.setattr(verifier, "verify", spy)
    for cut in (0, 10, 15, 25):
        propose = PROPOSERS["oracle"]([*prompt, *truth, *random_ids(8)])
        assert run(speak(engine, prompt, greedy(30), propose, truth[:cut])).token_ids == truth[cut:]
    assert {position for position, _ in seen} >= set(range(239, 268))
    assert all(length == runner.bucket(position) for position, length in seen)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_closed_sessions_block_is_cancelled(engine, monkeypatch, truths):
    """A block whose session is closed before its step is never judged, and the engine goes on."""
    gate = Gate(monkeypatch, engine.model.runner, "prefill")
    session = new_session(2, LONG)
    engine._scheduler.prefill(session)
    answer = engine._scheduler.submit(session, Block())
    assert gate.reached.wait(30)
    engine._scheduler.close(session)
    gate.open()
    with pytest.raises(CancelledError):
        answer.result(30)
    assert session.kv_length == CHUNK
    assert run(speak(engine, PROMPTS[2], greedy(NEW))).token_ids == truths[2]


def test_a_caller_that_gives_up_leaves_nothing_behind(engine, monkeypatch, truths):
    """A cancelled verification neither disturbs the step that it was part of nor keeps its slot."""

    async def give_up():
        session = await open_session(engine, PROMPTS[0], greedy(NEW))
        gate = Gate(monkeypatch, engine.model.runner, "logits")
        task = asyncio.ensure_future(engine.verify(session, ()))
        await asyncio.to_thread(gate.reached.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.close(session)
        engine.close(session)  # a second time does nothing
        gate.open()

    run(give_up())
    assert engine.pool.in_use == 0
    outputs = together(*(speak(engine, prompt, greedy(NEW)) for prompt in PROMPTS))
    assert [output.token_ids for output in outputs] == truths


def test_stopping_fails_what_waits(engine, monkeypatch):
    """Blocks that wait when the engine stops fail as unavailable, and later ones are refused in the same way."""
    gate = Gate(monkeypatch, engine.model.runner, "prefill")
    session = new_session(0, LONG)
    engine._scheduler.prefill(session)
    answer = engine._scheduler.submit(session, Block())
    assert gate.reached.wait(30)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    gate.open()
    stopping.join(30)
    with pytest.raises(UnavailableError):
        answer.result(0)
    with pytest.raises(UnavailableError):
        engine._scheduler.submit(session, Block())
    engine.stop()  # a second time does nothing


def test_a_scheduler_that_never_started_can_be_stopped(engine):
    """What was queued fails there too."""
    scheduler = Scheduler(Verifier(engine.model.runner, 8), prefill_chunk=CHUNK)
    answer = scheduler.submit(new_session(0, PROMPTS[0]), Block())
    scheduler.stop()
    assert isinstance(answer.exception(0), UnavailableError)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "error", "reason"),
    [
        (RuntimeError("secret details"), InternalError, "ENGINE_FAILED"),
        (torch.OutOfMemoryError("secret details"), OverloadedError, "OUT_OF_MEMORY"),
    ],
    ids=["error", "memory"],
)
@pytest.mark.parametrize("call", ["prefill", "logits"])
def test_a_failing_forward_pass(engine, monkeypatch, truths, call, failure, error, reason):
    """It fails the sessions of that pass with a reason and without details, and the engine serves the next ones."""

    def fail(*args):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(engine.model.runner, call, fail)
        with pytest.raises(error) as raised:
            run(speak(engine, PROMPTS[2], greedy(NEW)))
    assert raised.value.reason == reason
    assert "secret" not in str(raised.value)
    assert engine.pool.in_use == 0
    assert run(speak(engine, PROMPTS[2], greedy(NEW))).token_ids == truths[2]


def test_a_session_that_fails_a_step_fails_alone(engine, monkeypatch, truths):
    """When a step for several sessions fails, each gets a step of its own: only those that fail again fail."""
    logits = engine.model.runner.logits
    others = [prompt for prompt in PROMPTS if prompt is not PROMPTS[1]]

    def fail(first_slot, token_ids, starts, length):
        # The last token of the second prompt, in whichever step it is fed.
        place = [PROMPTS[1][-1], len(PROMPTS[1]) - 1]
        if place in torch.stack([token_ids[:, 0], starts], dim=1).tolist():
            raise RuntimeError("this one")
        return logits(first_slot, token_ids, starts, length)

    monkeypatch.setattr(engine.model.runner, "logits", fail)

    async def failing():
        with pytest.raises(InternalError):
            await speak(engine, PROMPTS[1], greedy(NEW))

    _, *outputs = together(failing(), *(speak(engine, prompt, greedy(NEW)) for prompt in others))
    assert [output.token_ids for output in outputs] == [truths[0], *truths[2:]]


def test_an_engine_thread_that_fails_says_so(tiny, load):
    """Should the thread itself fail, whoever watches is told, and what waits or comes later fails as unavailable."""
    engine, told = load("llama", slots=1), []
    scheduler = Scheduler(Verifier(engine.model.runner, 8), prefill_chunk=CHUNK, on_failure=told.append)

    class Broken:
        @property
        def closed(self):
            raise ZeroDivisionError

    answers = [scheduler.submit(Broken(), Block()), scheduler.submit(new_session(0, PROMPTS[0]), Block())]
    scheduler.start()
    assert all(isinstance(answer.exception(30), UnavailableError) for answer in answers)
    scheduler.stop()
    assert told == ["the engine failed: ZeroDivisionError"]
    with pytest.raises(UnavailableError):
        scheduler.submit(new_session(0, PROMPTS[0]), Block())


@pytest.fixture
def poison(engine):
    """An id whose embedding is not a number: whoever says it has no finite logits from then on."""
    used = {id_ for prompt in PROMPTS for id_ in prompt}
    poison = next(id_ for id_ in range(1, VOCABULARY) if id_ not in used)
    with torch.no_grad():
        engine.model.loaded.model.get_input_embeddings().weight[poison] = torch.nan
    return poison


@pytest.mark.parametrize("place", [0, 40, -1], ids=["first", "middle", "last"])
def test_logits_that_are_not_finite_fail_one_session(engine, truths, poison, place):
    """That session ends with an error that says so; neither those beside it nor the next one on its slot notice."""
    poisoned = list(PROMPTS[3])
    poisoned[place] = poison

    async def poisoned_session():
        with pytest.raises(InternalError) as raised:
            await speak(engine, poisoned, greedy(NEW))
        return raised.value.reason

    reason, *outputs = together(poisoned_session(), *(speak(engine, prompt, greedy(NEW)) for prompt in PROMPTS[:3]))
    assert reason == "NON_FINITE_LOGITS"
    assert [output.token_ids for output in outputs] == truths[:3]
    for _ in range(2):
        outputs = together(*(speak(engine, prompt, greedy(NEW)) for prompt in PROMPTS))
        assert [output.token_ids for output in outputs] == truths


def test_a_session_that_broke_before_its_first_block_poisons_no_slot(engine, truths, poison):
    """Not even a prompt that was prefilled and never judged leaves anything to the next session on its slot."""

    async def abandoned(slot):
        session = await open_session(engine, [poison, *PROMPTS[3]], greedy(NEW))
        while not session.prefilled:  # noqa: ASYNC110 - the engine thread tells nobody
            await asyncio.sleep(0)
        engine.close(session)

    together(*(abandoned(slot) for slot in range(engine.pool.slots)))
    assert all((slot_bits(engine, slot) != 0).any() for slot in range(engine.pool.slots))
    outputs = together(*(speak(engine, prompt, greedy(NEW)) for prompt in PROMPTS))
    assert [output.token_ids for output in outputs] == truths


def test_a_proposal_that_breaks_the_model_is_only_a_bad_proposal(engine, truths, poison):
    """Proposed ids that have no finite logits are rejected like any others: advice may cost time, not the session."""
    for prompt, truth in zip(PROMPTS, truths, strict=True):
        lie = [*truth[:2], poison, poison]
        said = run(speak(engine, prompt, greedy(NEW), lambda tokens, most, lie=lie: lie[:most]))
        assert said.token_ids == truth


# --- slots -----------------------------------------------------------------------------------------------------------


def test_no_session_writes_into_another_ones_slot(engine):
    """Steps and prefills of some sessions leave the positions of all others as they are, bit for bit, also where the
    others' slots lie between theirs and are part of the forward pass."""

    async def undisturbed():
        idle = [await open_session(engine, prompt, greedy()) for prompt in PROMPTS]
        for session in idle:
            await engine.verify(session, random_ids(7))
        engine.close(idle[0])
        engine.close(idle[3])
        before = [slot_bits(engine, session.slot) for session in idle]
        await asyncio.gather(
            speak(engine, LONG, greedy(NEW)), speak(engine, PROMPTS[2], greedy(NEW), PROPOSERS["liar"](LONG))
        )
        usable = engine.max_length
        for session, bits in list(zip(idle, before, strict=True))[1:3]:
            assert torch.equal(slot_bits(engine, session.slot)[:, :, :usable], bits[:, :, :usable])
            engine.close(session)

    run(undisturbed())


def test_what_a_rejected_proposal_wrote_is_never_seen(engine, truths):
    """A session whose every block is rejected has the very cache, and goes on, as one that never saw a proposal."""
    for prompt, truth in zip(PROMPTS, truths, strict=True):
        plain = run(speak(engine, prompt, greedy(NEW), nobody, keep_kv=True))
        lied = run(speak(engine, prompt, greedy(NEW), PROPOSERS["liar"]([*prompt, *truth]), keep_kv=True))
        assert lied.accepted == 0
        assert lied.token_ids == plain.token_ids == truth
        assert torch.equal(lied.kv, plain.kv)
