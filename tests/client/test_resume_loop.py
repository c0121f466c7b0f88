"""Laws of a turn's log whose stream breaks off: what is under way is gone, what is committed stays."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpair.errors import ProtocolError
from specpair.loop import Loop
from specpair.messages import Committed, Proposal, Started
from specpair.params import SamplingParams
from specpair.results import Source

from .fakes import VOCABULARY, Target, continuation

PROMPT = (3, 4, 5)
STARTED = Started("s", PROMPT, 0, len(PROMPT), 7, 1024)
PARAMS = SamplingParams(max_new_tokens=30)


def again(loop):
    """A target that was told all that the loop has, and what it answers."""
    target = Target(list(PROMPT), PARAMS)
    target.replay(loop.token_ids[len(PROMPT) :])
    return target, replace(STARTED, length=len(loop.token_ids))


@given(
    script=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 8)), min_size=1, max_size=60),
    depth=st.integers(0, 3),
)
def test_any_breaks_between_any_blocks_lose_and_repeat_nothing(script, depth):
    """Wherever streams break among blocks, verdicts and assumptions, the output is the target's, token by token."""
    loop = Loop(STARTED, PARAMS, vocabulary_size=VOCABULARY)
    target, _ = again(loop)
    verdicts, sent, rounds = deque(), 0, set()
    for move, right, count in [*script, *[(0, True, 3), (1, True, 0)] * 60]:
        if loop.finish_reason is not None:
            break
        if move == 0 and loop.open and loop.waiting <= depth:
            ask = loop.propose(ahead=depth)
            truth = continuation(ask.token_ids, count)
            ids = truth if right else [id_ % 7 + 1 for id_ in truth]
            block = loop.verify(ask, Proposal(ask.round, len(ask.token_ids), tuple(ids), Source.MODEL))
            rounds.add(block.round)
            verdicts.append(target.judge(block))
            sent += 1
        elif move in (1, 2) and verdicts:
            loop.commit(verdicts.popleft())
        elif move == 3:
            target, started = again(loop)
            verdicts.clear()
            loop.resume(started)
            assert (loop.waiting, loop.open) == (0, True)
            assert list(loop.propose().token_ids) == loop.token_ids
    assert loop.token_ids == [*PROMPT, *continuation(PROMPT, 30)]
    assert "".join(token.text for token in loop.tokens) == target.answer
    assert (loop.stale, len(rounds)) == (0, sent)
    assert loop.applied + loop.dropped == sent


def test_verdicts_that_were_due_are_not_expected_any_more():
    """A stale verdict on the new stream is a disagreement again, not the echo of a dropped block."""
    loop = Loop(STARTED, PARAMS)
    ask = loop.propose(ahead=1)
    dropped = loop.verify(ask, Proposal(ask.round, len(PROMPT), (1, 1, 1), Source.MODEL))
    target, started = again(loop)
    loop.resume(started)
    assert loop.under_way is None
    block = loop.verify(loop.propose(), None)
    with pytest.raises(ProtocolError, match="which is not under way"):
        loop.commit(replace(target.judge(block), round=dropped.round))


def test_a_target_that_stands_elsewhere_is_not_believed():
    """Another length, another prompt, or a cache that cannot be there."""
    loop = Loop(STARTED, PARAMS)
    loop.append(Committed((1, 2), "ab", (1, 1)))
    good = replace(STARTED, length=5)
    for bad in (
        STARTED,
        replace(good, length=6),
        replace(good, cached_tokens=1),
        replace(good, prompt_token_ids=(3, 4, 6)),
        replace(good, prompt_token_ids=(*PROMPT, 1, 2)),
    ):
        assert not loop.stands_at(bad)
        with pytest.raises(ProtocolError, match="goes on at length"):
            loop.resume(bad)
    loop.resume(good)
    assert loop.token_ids == [*PROMPT, 1, 2]


def test_limits_are_those_of_the_new_stream():
    """A block may carry what the target that goes on can take, and tokens before the break count."""
    loop = Loop(STARTED, SamplingParams(max_new_tokens=5))
    loop.append(Committed((1, 2), "ab", (1, 1)))
    loop.resume(replace(STARTED, length=5, max_block_tokens=7, max_length=1024))
    assert loop.limit == 2
    loop.resume(replace(STARTED, length=5, max_block_tokens=1, max_length=1024))
    assert loop.limit == 1
    loop.resume(replace(STARTED, length=5, max_block_tokens=7, max_length=5))
    assert loop.limit == 0
