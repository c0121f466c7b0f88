"""Blocks that arrive twice, late, early, in the wrong order or from nowhere: all stale, and nothing is changed."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specpair_target.blocks import Block, Stale, Verification

from ..tiny import VOCABULARY, random_ids
from .driving import greedy, kv_of, open_session, run, sampled, speak, together

NEW = 24
PROMPTS = [random_ids(11, seed=8), random_ids(249, seed=8)]  # the second one crosses a border of attended lengths
OPTIONS = [greedy(NEW), sampled(NEW, temperature=1.0, seed=7)]
IDS = st.lists(st.integers(0, VOCABULARY - 1), max_size=7)

# What is sent between two good blocks. Each is made from the session's tokens and the good blocks so far.
REPLAY = st.tuples(st.just("replay"), st.integers(0, 1000))
BASE = st.tuples(st.just("base"), st.one_of(st.integers(-300, -1), st.integers(1, 300), st.just(2**32 - 1)), IDS)
LAST = st.tuples(st.just("last"), st.integers(1, VOCABULARY - 1), IDS)
EARLY = st.tuples(st.just("early"), st.integers(1, 8))
NOISE = st.lists(st.one_of(REPLAY, BASE, LAST, EARLY), max_size=4)
# A good block: how many ids it proposes, and which of them is wrong, if any.
GOOD = st.tuples(st.integers(0, 7), st.integers(0, 20))
ROUNDS = st.lists(st.tuples(NOISE, GOOD, st.booleans(), NOISE), min_size=1, max_size=8)


def noise(kind, tokens, truth, sent):
    """A block that does not continue the session."""
    match kind:
        case ("replay", number) if sent:
            return sent[number % len(sent)]
        case ("base", offset, ids):
            return Block(ids, max(len(tokens) + offset, 0))
        case ("last", other, ids):
            return Block(ids, len(tokens), (tokens[-1] + other) % VOCABULARY)
        case ("early", ahead):
            # What will be right when so many tokens more have been said.
            length = len(tokens) + ahead
            return Block(truth[length : length + 3], length, truth[length - 1] if length <= len(truth) else 0)
    return None


async def disturbed(engine, prompt, options, truth, rounds):
    """A session among disturbances, to the end of its turn: what it said, and its cache."""
    session = await open_session(engine, prompt, options)
    whole, sent, said = [*prompt, *truth], [], []
    try:
        number = 0
        while not session.finish_reason:
            before, (count, wrong), twice, after = rounds[number % len(rounds)]
            number += 1
            tokens = list(session.tokens)
            ids = [
                id_ ^ 1 if place == wrong else id_ for place, id_ in enumerate(whole[len(tokens) : len(tokens) + count])
            ]
            good = Block(ids, len(tokens), tokens[-1])
            stale = [block for kind in before if (block := noise(kind, tokens, whole, sent)) is not None]
            behind = [good] if twice else []
            # What is stale in front of the good block is stale behind it, too: but for what comes early.
            behind += [
                block
                for kind in after
                if kind[0] != "early" and (block := noise(kind, tokens, whole, sent)) is not None
            ]
            behind = [block for block in behind if block.base_length <= len(tokens)]
            answers = await asyncio.gather(*(engine.submit(session, block) for block in (*stale, good, *behind)))
            verdict = answers.pop(len(stale))
            assert isinstance(verdict, Verification)
            assert verdict.base_length == len(tokens)
            assert all(isinstance(answer, Stale) for answer in answers)
            said += verdict.commit.token_ids
            sent.append(good)
        for block in sent:
            assert isinstance(await engine.submit(session, block), Stale)
        return said, kv_of(engine, session)
    finally:
        engine.close(session)


@pytest.fixture(scope="module")
def undisturbed(engine_of):
    engine = engine_of("llama", dtype="bf16")
    return engine, [
        run(speak(engine, prompt, options, keep_kv=True)) for prompt, options in zip(PROMPTS, OPTIONS, strict=True)
    ]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(ROUNDS, ROUNDS))
def test_disturbances_change_nothing(undisturbed, rounds):
    """Two sessions side by side, each with random disturbances before and behind its good blocks, say what they say
    undisturbed, and leave bit for bit the same keys and values; every disturbance is answered as stale."""
    engine, expected = undisturbed
    outcomes = together(
        *(
            disturbed(engine, prompt, options, output.token_ids, own)
            for prompt, options, output, own in zip(PROMPTS, OPTIONS, expected, rounds, strict=True)
        )
    )
    for (said, kv), output in zip(outcomes, expected, strict=True):
        assert said == output.token_ids
        assert kv.equal(output.kv)
    assert engine.pool.in_use == 0
