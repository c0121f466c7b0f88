"""The draft's engine: whose proposer works on which slot, and when."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from specpair.errors import InternalError, InvalidRequestError, OverloadedError, UnavailableError
from specpair.v1 import common_pb2
from specpair.v1.common_pb2 import Source
from specpair_draft.asks import Ask, Turn
from specpair_draft.config import DraftConfig
from specpair_draft.engine import Engine
from specpair_runtime.serving import Caller, ServiceStatus

from ..tiny import random_ids
from .conftest import CHUNK, SLOTS

MODEL, NGRAM = Source.SOURCE_MODEL, Source.SOURCE_NGRAM


@pytest.fixture
def lookup():
    """An engine without a model."""
    engine = Engine.load(DraftConfig(proposer="ngram"), ServiceStatus())
    yield engine
    engine.stop()


def turn(length, seed=0):
    return Turn(random_ids(length, seed=seed), length)


async def answers(proposer, ask):
    """What answers an ask, proposal by proposal; an error is raised."""
    said = asyncio.Queue()
    proposer.ask(ask, said.put_nowait)
    for _ in range(ask.proposals):
        answer = await said.get()
        if isinstance(answer, Exception):
            raise answer
        yield answer


async def propose(proposer, ask):
    """The ids of the first proposal."""
    return (await anext(answers(proposer, ask))).proposal.token_ids


async def rounds(engine, prompt, count=3):
    """What a session is proposed in some rounds, of which each is accepted in part."""
    said = []
    async with engine.proposer(MODEL) as proposer:
        proposer.begin(prompt)
        for _ in range(count):
            said.append(await propose(proposer, Ask(proposer.length, said[-1][:2] if said else [], 4)))
    return said


def test_a_slot_is_held_as_long_as_the_session(engine):
    """A model's proposer has a slot of its own until its context ends, however it ends; prompt lookup needs none."""

    async def check():
        async with engine.proposer(MODEL), engine.proposer(MODEL), engine.proposer(NGRAM):
            assert engine.pool.in_use == 2
        assert engine.pool.in_use == 0
        with pytest.raises(ZeroDivisionError):
            async with engine.proposer(MODEL):
                raise ZeroDivisionError
        assert engine.pool.in_use == 0

    asyncio.run(check())


def test_more_sessions_than_slots(engine):
    """Each gets exactly what it gets alone; those without a slot wait for one."""
    prompts = [turn(9 + 7 * number, seed=number) for number in range(3 * SLOTS)]

    async def alone():
        return [await rounds(engine, prompt) for prompt in prompts]

    async def together():
        return await asyncio.gather(*(rounds(engine, prompt) for prompt in prompts))

    assert asyncio.run(together()) == asyncio.run(alone())
    assert engine.pool.in_use == 0


def in_a_moment():
    return Caller(deadline=time.monotonic() + 0.01)


def test_no_slot_in_time(load):
    """A session that gets no slot within its own time is told why."""
    engine = load("llama-small", slots=1)

    async def check():
        async with engine.proposer(MODEL):
            with pytest.raises(OverloadedError) as error:
                async with engine.proposer(MODEL, in_a_moment()):
                    pass
            assert error.value.reason == "KV_SLOTS_EXHAUSTED"
        async with engine.proposer(MODEL, in_a_moment()):
            pass

    asyncio.run(check())


def test_who_proposes(engine, lookup):
    """Without a wish the first source of the service; a source that is not there is refused by name."""

    async def source_of(of, wish):
        async with of.proposer(wish) as proposer:
            return proposer.source

    async def refused(of, wish):
        with pytest.raises(InvalidRequestError) as error:
            await source_of(of, wish)
        return error.value.field

    assert (engine.sources, lookup.sources) == ([MODEL, NGRAM], [NGRAM])
    assert asyncio.run(source_of(engine, Source.SOURCE_UNSPECIFIED)) == MODEL
    assert asyncio.run(source_of(lookup, Source.SOURCE_UNSPECIFIED)) == NGRAM
    assert asyncio.run(source_of(engine, NGRAM)) == NGRAM
    for of, wish in ((lookup, MODEL), (engine, Source.SOURCE_PREDICTION), (engine, Source.SOURCE_TARGET), (engine, 99)):
        assert asyncio.run(refused(of, wish)) == "start.proposer"


def test_prompt_lookup_works_without_a_model(lookup):
    """It proposes what followed before."""

    async def check():
        async with lookup.proposer(NGRAM) as proposer:
            proposer.begin(Turn([5, 6, 7, 8, 5, 6], 6))
            return [timed.proposal.token_ids async for timed in answers(proposer, Ask(6, [7], 2, proposals=2))]

    assert asyncio.run(check()) == [[8, 5], [6, 7]]


def test_a_long_prompt_lets_others_pass(engine, monkeypatch):
    """Between two chunks of a prompt's prefill, a step of another session's round is worked on."""
    runner = engine.model.runner
    prefill, logits = runner.prefill, runner.logits
    reached, go_on = threading.Event(), threading.Event()
    events = []

    def chunk(*args):
        events.append("chunk")
        reached.set()
        assert go_on.wait(30)
        return prefill(*args)

    async def check():
        async with engine.proposer(MODEL) as short, engine.proposer(MODEL) as long:
            short.begin(turn(5))
            monkeypatch.setattr(runner, "prefill", chunk)
            monkeypatch.setattr(runner, "logits", lambda *args: events.append("step") or logits(*args))
            long.begin(turn(6 * CHUNK))
            await asyncio.to_thread(reached.wait, 30)
            asked = asyncio.create_task(propose(short, Ask(5, [], 2)))
            await asyncio.sleep(0)
            go_on.set()
            await asked
            await propose(long, Ask(6 * CHUNK, [], 1))

    asyncio.run(check())
    assert events[:4] == ["chunk", "chunk", "step", "chunk"]
    assert [events.index("step"), events.count("chunk")] == [2, 6]


def test_a_session_that_ends_in_the_middle_of_a_round(engine, monkeypatch):
    """Its slot goes to the next session at once; what the engine still does there is done before that one's turn."""
    runner = engine.model.runner
    logits = runner.logits
    reached, go_on = threading.Event(), threading.Event()

    def step(*args):
        reached.set()
        assert go_on.wait(30)
        return logits(*args)

    async def check():
        expected = await rounds(engine, turn(12))
        with monkeypatch.context() as patch:
            patch.setattr(runner, "logits", step)
            leaving = asyncio.create_task(rounds(engine, turn(50)))
            await asyncio.to_thread(reached.wait, 30)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert engine.pool.in_use == 0
            arriving = asyncio.create_task(rounds(engine, turn(12)))
            await asyncio.sleep(0)
            go_on.set()
            assert await arriving == expected

    asyncio.run(check())


def test_a_round_goes_on_while_others_come(engine, monkeypatch):
    """Who asks while a step of somebody else's round is under way is in the next one."""
    runner = engine.model.runner
    logits = runner.logits
    reached, go_on = threading.Event(), threading.Event()
    sessions = []

    def step(*args):
        sessions.append(int((args[2] != runner.parking).sum()))
        reached.set()
        assert go_on.wait(30)
        return logits(*args)

    async def check():
        async with engine.proposer(MODEL) as first, engine.proposer(MODEL) as second:
            first.begin(turn(1))
            second.begin(turn(1, seed=1))
            monkeypatch.setattr(runner, "logits", step)
            asked = [asyncio.create_task(propose(first, Ask(1, [], 5)))]
            await asyncio.to_thread(reached.wait, 30)
            asked.append(asyncio.create_task(propose(second, Ask(1, [], 4))))
            await asyncio.sleep(0)
            go_on.set()
            await asyncio.gather(*asked)

    asyncio.run(check())
    assert sessions[:5] == [1, 2, 2, 2, 2]


def test_an_engine_that_stops_says_so(load):
    """What is asked then, and what comes later, ends with UnavailableError."""
    engine = load("llama-small")
    runner = engine.model.runner
    logits = runner.logits
    reached, go_on = threading.Event(), threading.Event()

    def step(*args):
        reached.set()
        assert go_on.wait(30)
        return logits(*args)

    async def check():
        async with engine.proposer(MODEL) as proposer:
            proposer.begin(turn(5))
            runner.logits = step
            asked = asyncio.create_task(propose(proposer, Ask(5, [], 40)))
            await asyncio.to_thread(reached.wait, 30)
            # The step under way ends in its own time, and the round with it.
            threading.Timer(0.1, go_on.set).start()
            await asyncio.to_thread(engine.stop)
            with pytest.raises(UnavailableError):
                await asked
            with pytest.raises(UnavailableError):
                await propose(proposer, Ask(5, [], 4))
            with pytest.raises(UnavailableError):
                proposer.begin(turn(5))
        assert engine.pool.in_use == 0

    asyncio.run(check())


def test_a_session_whose_engine_fails_is_told_and_frees_its_slot(engine, monkeypatch):
    """Others go on, on that slot too."""

    async def check():
        expected = await rounds(engine, turn(12))
        with monkeypatch.context() as patch:
            patch.setattr(engine.model.runner, "logits", None)
            with pytest.raises(InternalError) as error:
                await rounds(engine, turn(12))
        assert error.value.reason == "ENGINE_FAILED"
        assert engine.pool.in_use == 0
        assert await rounds(engine, turn(12)) == expected

    asyncio.run(check())


def test_a_thread_that_fails_is_reported(load, monkeypatch):
    """The status says that the service has failed, what is asked is answered, and nothing is asked any more."""
    engine = load("llama-small")
    status = ServiceStatus()
    engine._scheduler._on_failure = status.fail

    def broken():
        raise ZeroDivisionError

    async def check():
        async with engine.proposer(MODEL) as proposer:
            proposer.begin(turn(5))
            monkeypatch.setattr(engine._scheduler._lockstep, "turn", broken)
            with pytest.raises(UnavailableError):
                await propose(proposer, Ask(5, [], 4))
            with pytest.raises(UnavailableError):
                await propose(proposer, Ask(5, [], 4))

    asyncio.run(check())
    engine.stop()
    assert status.phase == common_pb2.PHASE_FAILED
    assert "ZeroDivisionError" in status.snapshot.detail


def test_without_run_ahead_nothing_is_done_unasked(load, monkeypatch):
    """`--no-run-ahead`: as many steps as there are new ids, and never one more."""
    engine = load("llama-small", run_ahead=False)
    steps = []
    logits = engine.model.runner.logits
    monkeypatch.setattr(engine.model.runner, "logits", lambda *args: steps.append(args) or logits(*args))
    assert len(asyncio.run(rounds(engine, turn(12), 5))) == 5
    engine.stop()
    # Two of the four came true, and the two behind them were there.
    assert len(steps) == 4 + 4 * 2
