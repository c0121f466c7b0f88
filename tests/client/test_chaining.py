"""Laws of a turn in which blocks go ahead of their verdicts, with in-memory services that take their time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specpair import (
    AcceptanceRule,
    DeadlineError,
    InvalidRequestError,
    SamplingParams,
    Source,
    SpeculativeClient,
    UnavailableError,
)
from specpair.messages import Proposal

from .. import virtual_time
from . import fakes
from .fakes import FakeDraft, FakeTarget, continuation, tokenized

PROMPT = (3, 4, 5)
COUNT = 48
PARAMS = SamplingParams(max_new_tokens=COUNT)
LOST = [fakes.wrong_round, fakes.wrong_base, fakes.starting_again, fakes.hanging, fakes.dying]


def client(target=None, draft=None, mode="draft:1", **options):
    options = {"draft_timeout": 0.1, "lookup": False, "chain": 3, **options}
    return SpeculativeClient(
        "target:1", mode, target_transport=target or FakeTarget(), draft_transport=draft or FakeDraft(), **options
    )


def generate(*args, params=PARAMS, **options):
    async def run():
        async with client(*args, **options) as opened:
            result = await opened.generate(PROMPT, params)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return virtual_time.run(run())


def half_right(draft, ask):
    """The truth, with a wrong id now and then."""
    rng = random.Random(len(draft.log))
    ids = continuation(draft.log, ask.max_tokens, draft.seed)
    if rng.random() < 0.4:
        ids[rng.randrange(len(ids))] ^= 1
    return Proposal(ask.round, len(draft.log), tuple(ids), Source.MODEL, draft_us=50)


async def _drain(stream):
    async for _ in stream:
        pass


def name(value):
    return getattr(value, "__name__", None)


@given(
    behaviour=st.sampled_from([fakes.perfect, half_right, fakes.liar, *LOST]),
    mode=st.sampled_from(["draft:1", "ngram", "none"]),
    lookup=st.booleans(),
    chain=st.sampled_from([0, 1, 2, 5, None]),
    draft_length=st.sampled_from([None, 0, 1, 3, 7]),
    seed=st.integers(0, 9),
    delays=st.tuples(st.sampled_from([0.0, 0.001]), st.sampled_from([0.0, 0.001])),
)
@settings(max_examples=150)
def test_the_output_does_not_depend_on_the_chain(behaviour, mode, lookup, chain, draft_length, seed, delays):
    """For every proposer, depth and speed the tokens are the target's, and every block sent is judged or dropped."""
    target, draft = FakeTarget(delay=delays[0]), FakeDraft(behaviour, delay=delays[1])
    params = SamplingParams(max_new_tokens=COUNT, seed=seed)
    options = {"chain": chain, "draft_length": draft_length, "lookup": lookup, "draft_timeout": 0.02}
    result = generate(target, draft, mode, params=params, **options)
    assert list(result.token_ids) == continuation(PROMPT, COUNT, seed)
    stats = result.stats
    assert stats.stale == 0
    if mode != "none":
        assert stats.rounds + stats.dropped == len(target.blocks)
        assert stats.rounds == sum(stats.rounds_by_source.values()) == sum(stats.draft_lengths.values())
        assert sum(stats.accepted_by_position) == stats.accepted
        assert sum(length * times for length, times in stats.draft_lengths.items()) == stats.proposed
        assert all(change.round <= stats.rounds for change in stats.proposer_changes)


def test_a_perfect_draft_is_asked_once_for_many_blocks():
    """What it pushes is used up, and its next ask goes out with the last of it."""
    target, draft = FakeTarget(), FakeDraft()
    result = generate(target, draft, draft_length=3)
    assert result.stats.rounds == COUNT // 4
    assert result.stats.dropped == 0
    assert {ask.proposals for ask in draft.asks} == {4}
    assert {ask.max_tokens for ask in draft.asks} == {4}
    assert len(draft.asks) <= COUNT // 16 + 1
    assert [block.base_length for block in target.blocks] == list(range(3, 3 + COUNT, 4))


def test_blocks_are_under_way_together():
    """The chain's length more than one of them, and no more."""

    async def run():
        target = FakeTarget(delay=0.005)
        most = 0
        async with client(target, draft_length=3) as opened, opened.stream(PROMPT, PARAMS) as stream:
            async for _ in stream:
                most = max(most, len(target.blocks) - stream.stats.rounds)
        return most

    assert virtual_time.run(run()) == 3


def test_asks_take_back_what_did_not_come_true():
    """The draft hears the tokens from the first difference on, which may be behind what it was told before."""
    draft = FakeDraft(half_right, delay=0.001)
    result = generate(FakeTarget(delay=0.002), draft, draft_length=1, params=SamplingParams(max_new_tokens=200, seed=4))
    assert list(result.token_ids) == continuation(PROMPT, 200, 4)
    assert result.stats.dropped > 0
    told = [(ask.from_position, ask.from_position + len(ask.token_ids)) for ask in draft.asks]
    assert any(start < end for (_, end), (start, _) in pairwise(told))


def test_without_a_chain_each_block_waits_for_its_verdict():
    """One proposal per ask, no guess."""
    draft = FakeDraft()
    result = generate(None, draft, chain=0, draft_length=3)
    assert {(ask.proposals, ask.max_tokens) for ask in draft.asks[:-1]} == {(1, 3)}
    assert result.stats.dropped == 0
    assert len(draft.asks) == result.stats.rounds


def test_nothing_goes_ahead_under_the_rejection_rule():
    """A guess of the target's draw would hardly ever be right."""
    target, draft = FakeTarget(), FakeDraft()
    params = SamplingParams(max_new_tokens=COUNT, rule=AcceptanceRule.REJECTION)
    result = generate(target, draft, params=params, draft_length=3)
    assert list(result.token_ids) == continuation(PROMPT, COUNT)
    assert {ask.proposals for ask in draft.asks} == {1}
    assert result.stats.dropped == 0


@pytest.mark.parametrize("behaviour", LOST, ids=name)
def test_a_draft_lost_in_mid_chain_is_replaced(behaviour):
    """Lookups go on from there; what the draft had proposed before is judged as ever."""
    draft = FakeDraft(behaviour)
    result = generate(None, draft, draft_length=2, chain=1)
    assert list(result.token_ids) == continuation(PROMPT, COUNT)
    [change] = result.stats.proposer_changes
    assert change.proposer == result.stats.proposer == "ngram"
    assert draft.streams[0].cancelled


@pytest.mark.parametrize("mode", ["draft:1", "ngram"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_leaving_in_mid_chain_leaves_nothing(mode, after):
    """No task, no stream, however many blocks and asks are under way."""

    async def run():
        target, draft = FakeTarget(delay=0.001), FakeDraft(half_right, delay=0.001)
        async with client(target, draft, mode) as opened:
            async with opened.stream(PROMPT, PARAMS) as stream:
                for _ in range(after):
                    await anext(stream)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert all(stream.cancelled for stream in target.streams + draft.streams)

    virtual_time.run(run())


@pytest.mark.parametrize("slow", ["target", "draft"])
def test_a_deadline_holds_in_mid_chain(slow):
    """Whoever is waited for."""

    async def run():
        target, draft = FakeTarget(), FakeDraft()
        async with client(target, draft, draft_timeout=3600) as opened:
            stream = opened.stream(PROMPT, SamplingParams(max_new_tokens=900), timeout=0.05)
            await anext(stream)
            for each in target.streams if slow == "target" else draft.streams:
                each.delay = 3600
            with pytest.raises(DeadlineError):
                await _drain(stream)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert stream.tokens != ()

    virtual_time.run(run())


def test_losing_the_target_in_mid_chain_is_an_error():
    """With the tokens so far, and nothing left behind."""

    async def run():
        async with client(FakeTarget(fails_after=4), draft_length=3, resume_timeout=0) as opened:
            stream = opened.stream(PROMPT, PARAMS)
            with pytest.raises(UnavailableError):
                async for _ in stream:
                    pass
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert [token.id for token in stream.tokens] == continuation(PROMPT, 16)

    virtual_time.run(run())


@pytest.mark.parametrize("stop", [(), (2,), (6,)])
@pytest.mark.parametrize("behaviour", [fakes.perfect, half_right], ids=name)
def test_a_turn_begins_while_blocks_of_the_last_one_are_answered(stop, behaviour):
    """Their stale verdicts and the draft's further proposals are passed over."""
    params = SamplingParams(max_new_tokens=COUNT, stop_token_ids=stop)

    async def run():
        async with client(FakeTarget(), FakeDraft(behaviour), draft_length=2) as opened, opened.session() as session:
            return [await session.generate(prompt, params) for prompt in ("a", (4, 9), "c")]

    log = []
    for prompt, result in zip(("a", (4, 9), "c"), virtual_time.run(run()), strict=True):
        log += tokenized(prompt)
        expected = continuation(log, COUNT)
        ends = [i for i, id_ in enumerate(expected) if id_ in stop]
        expected = expected[: ends[0] + 1] if ends else expected
        assert list(result.token_ids) == expected
        assert (result.stats.stale, result.stats.proposer_changes) == (0, ())
        log += result.token_ids


def test_statistics_of_positions_and_lengths():
    """How far proposals came, by position, and the acceptance that explains it."""
    stats = generate(None, FakeDraft(half_right), draft_length=3, chain=0).stats
    assert stats.draft_lengths.keys() <= {0, 1, 2, 3}
    assert len(stats.reached_by_position) == len(stats.accepted_by_position) == 3
    # Who comes to a position was accepted at the one before it.
    assert all(
        reached <= accepted
        for reached, accepted in zip(stats.reached_by_position[1:], stats.accepted_by_position, strict=False)
    )
    assert 0.0 < stats.acceptance_per_token < 1.0
    assert generate(None, FakeDraft(), draft_length=3).stats.acceptance_per_token == pytest.approx(1.0)
    assert generate(mode="ngram", draft_length=0).stats.acceptance_per_token is None
    assert generate(mode="ngram", draft_length=0).stats.draft_lengths == Counter({0: COUNT})


def test_a_negative_chain_is_refused():
    """By name."""
    with pytest.raises(InvalidRequestError) as refused:
        client(chain=-1)
    assert refused.value.field == "chain"
