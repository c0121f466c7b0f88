"""The draft's engine: whose proposer works on which slot, and when."""

from __future__ import annotations

import asyncio
import threading

import pytest

from specpair.errors import InvalidRequestError, OverloadedError
from specpair.v1.common_pb2 import Source
from specpair_draft.config import DraftConfig
from specpair_draft.engine import Ask, Engine
from specpair_draft.proposers import NgramProposer, Turn
from specpair_runtime.serving import ServiceStatus

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


async def rounds(engine, prompt, count=3):
    """What a session is proposed in some rounds, of which each is accepted in part."""
    said = []
    async with engine.proposer(MODEL, None) as proposer:
        await engine.begin(proposer, prompt)
        for _ in range(count):
            ask = Ask(proposer.length, said[-1][:2] if said else [], 4)
            said.append((await engine.propose(proposer, ask)).proposal.token_ids)
    return said


def test_a_slot_is_held_as_long_as_the_session(engine):
    """A model's proposer has a slot of its own until its context ends, however it ends; prompt lookup needs none."""

    async def check():
        async with engine.proposer(MODEL, None), engine.proposer(MODEL, None), engine.proposer(NGRAM, None):
            assert engine.pool.in_use == 2
        assert engine.pool.in_use == 0
        with pytest.raises(ZeroDivisionError):
            async with engine.proposer(MODEL, None):
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


def test_no_slot_in_time(load):
    """A session that gets no slot within its own time is told why."""
    engine = load("llama-small", slots=1)

    async def check():
        async with engine.proposer(MODEL, None):
            with pytest.raises(OverloadedError) as error:
                async with engine.proposer(MODEL, 0.01):
                    pass
            assert error.value.reason == "KV_SLOTS_EXHAUSTED"
        async with engine.proposer(MODEL, 0.01):
            pass

    asyncio.run(check())


def test_who_proposes(engine, lookup):
    """Without a wish the first source of the service; a source that is not there is refused by name."""

    async def source_of(of, wish):
        async with of.proposer(wish, None) as proposer:
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
        async with lookup.proposer(NGRAM, None) as proposer:
            assert isinstance(proposer, NgramProposer)
            await lookup.begin(proposer, Turn([5, 6, 7, 8, 5, 6], 6))
            return (await lookup.propose(proposer, Ask(6, [7], 2))).proposal.token_ids

    assert asyncio.run(check()) == [8, 5]


def test_a_long_prompt_lets_others_pass(engine, monkeypatch):
    """Between two chunks of a prompt's prefill, a round of another session is worked on."""
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
        async with engine.proposer(MODEL, None) as short, engine.proposer(MODEL, None) as long:
            await engine.begin(short, turn(5))
            monkeypatch.setattr(runner, "prefill", chunk)
            monkeypatch.setattr(runner, "logits", lambda *args: events.append("step") or logits(*args))
            beginning = asyncio.create_task(engine.begin(long, turn(6 * CHUNK)))
            await asyncio.to_thread(reached.wait, 30)
            asked = asyncio.create_task(engine.propose(short, Ask(5, [], 2)))
            await asyncio.sleep(0)
            go_on.set()
            await asyncio.gather(beginning, asked)

    asyncio.run(check())
    assert events == ["chunk", "step", "step", *["chunk"] * 5]


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
