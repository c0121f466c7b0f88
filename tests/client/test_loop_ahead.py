"""Laws of blocks that are sent ahead of the verdict on the block before."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpair.errors import ProtocolError
from specpair.loop import Loop
from specpair.messages import Committed, Proposal, Started, Verdict
from specpair.params import AcceptanceRule, SamplingParams
from specpair.results import FinishReason, Source

from .fakes import VOCABULARY, Target, continuation, unrolled

PROMPT = (3, 4, 5)


def started(prompt=PROMPT, width=8, max_length=1024):
    return Started("s", tuple(prompt), 0, len(prompt), width - 1, max_length)


def send(loop, ids, ahead=1, most=None):
    """Asks and sends; returns the block."""
    ask = loop.propose(most, ahead=ahead)
    assert loop.stands(ask)
    return loop.verify(ask, Proposal(ask.round, len(ask.token_ids), tuple(ids), Source.MODEL))


def wrong(ids):
    """The same but for the last id."""
    return [*ids[:-1], ids[-1] % 7 + 1]


class Wire:
    """A target that judges in order, and the ways there and back, each as slow as it likes."""

    def __init__(self, target):
        self.target = target
        self.there, self.back = deque(), deque()

    def judge(self):
        self.back.append(self.target.judge(self.there.popleft()))


class Script:
    """Numbers from a list, again and again."""

    def __init__(self, numbers):
        self._numbers, self._at = numbers, 0

    def next(self, below):
        self._at += 1
        return self._numbers[self._at % len(self._numbers)] % below


@given(
    prompt=st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=12),
    max_new_tokens=st.integers(1, 40),
    width=st.integers(1, 9),
    max_length=st.integers(14, 60),
    stop=st.sampled_from([(), (3,), (5, 6)]),
    depth=st.integers(0, 6),
    script=st.lists(st.integers(0, 10**6), min_size=1, max_size=40),
)
def test_any_interleaving_of_any_blocks_gives_the_targets_tokens_once(
    prompt, max_new_tokens, width, max_length, stop, depth, script
):
    """Whatever is proposed, however many blocks are under way and whenever verdicts come, the output is the target's
    own; unexpected stale verdicts do not occur, and every block is judged or dropped."""
    params = SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=stop)
    loop = Loop(started(prompt, width, max_length), params, vocabulary_size=VOCABULARY)
    wire, chance = Wire(Target(list(prompt), params, max_length)), Script(script)
    sent = 0
    while loop.finish_reason is None:
        move = chance.next(4)
        if move == 0 and loop.open and loop.waiting <= depth:
            ask = loop.propose(ahead=depth)
            assert ask.committed == len(loop.token_ids) <= len(ask.token_ids)
            assert list(ask.token_ids[: ask.committed]) == loop.token_ids
            assert len(ask.token_ids) + ask.max_tokens <= max(max_length, len(prompt))
            truth = continuation(ask.token_ids, chance.next(width + 2))
            ids = truth if chance.next(3) or not truth else wrong(truth)
            block = loop.verify(ask, Proposal(ask.round, len(ask.token_ids), tuple(ids), Source.MODEL))
            assert len(block.token_ids) <= ask.max_tokens < width
            assert block.base_length + len(block.token_ids) - len(prompt) < max_new_tokens
            wire.there.append(block)
            sent += 1
        elif move == 3 and loop.steady and loop.waiting <= depth:
            steps = unrolled(loop.steps(1 + chance.next(3)))
            wire.there.extend(steps)
            assert wire.there[-1].base_length + 1 - len(prompt) <= max_new_tokens
            assert wire.there[-1].base_length < max_length
            sent += len(steps)
        elif move == 1 and wire.there:
            wire.judge()
        elif wire.back:
            loop.commit(wire.back.popleft())
        elif wire.there:
            wire.judge()
        elif not loop.waiting:
            wire.there.append(send(loop, (), ahead=0))
            sent += 1
    expected, finish = Target(list(prompt), params, max_length), None
    while finish is None:
        _, _, finish = expected.commit(continuation(expected.log, 1)[0])
    assert loop.token_ids == expected.log == wire.target.log
    assert [token.id for token in loop.tokens] == expected.log[len(prompt) :]
    assert loop.finish_reason is finish
    assert loop.stale == 0
    assert loop.applied + loop.dropped == sent
    for verdict in [*wire.back, *map(wire.target.judge, wire.there)]:
        assert loop.commit(verdict).tokens == ()
    assert loop.stale == 0


def test_a_block_goes_out_without_its_guess():
    """The last id proposed is what the next block goes on behind, and not part of this one."""
    loop, truth = Loop(started(), SamplingParams()), continuation(PROMPT, 8)
    first, second = send(loop, truth[:4]), send(loop, truth[4:])
    assert (first.token_ids, first.base_length, first.last_token_id) == (tuple(truth[:3]), 3, 5)
    assert (second.token_ids, second.base_length, second.last_token_id) == (tuple(truth[4:7]), 7, truth[3])
    assert loop.waiting == 2
    assert loop.token_ids == list(PROMPT)


def test_the_guess_comes_on_top_of_a_whole_block():
    """One id more than a block may have is asked for, and no more than that is sent."""
    loop, truth = Loop(started(width=4), SamplingParams()), continuation(PROMPT, 9)
    ask = loop.propose(ahead=1)
    assert (ask.max_tokens, ask.most) == (3, 4)
    assert send(loop, truth).token_ids == tuple(truth[:3])
    assert send(loop, truth[4:]).token_ids == tuple(truth[4:7])


def test_nothing_follows_a_block_without_a_guess():
    """With no id to guess by the verdict must be waited for."""
    loop = Loop(started(), SamplingParams())
    send(loop, ())
    assert not loop.open
    loop.commit(Target(list(PROMPT), SamplingParams()).judge(loop.under_way.block))
    assert loop.open


def test_a_wrong_guess_drops_what_was_built_on_it():
    """The committed tokens stay, asks of before no longer stand, and the log goes on behind the target's own token."""
    loop, target = Loop(started(), SamplingParams()), Target(list(PROMPT), SamplingParams())
    truth = continuation(PROMPT, 9)
    first, second = send(loop, wrong(truth[:4])), send(loop, truth[4:8])
    ask = loop.propose(ahead=1)
    chunk = loop.commit(target.judge(first))
    assert [token.id for token in chunk.tokens] == truth[:4]
    assert (loop.waiting, loop.dropped, loop.stands(ask)) == (0, 1, False)
    assert list(ask.token_ids[len(PROMPT) :]) == wrong(truth[:4]) + truth[4:8]
    third = send(loop, truth[4:])
    assert third.base_length == 7
    assert loop.commit(target.judge(second)).tokens == ()
    loop.commit(target.judge(third))
    assert [token.id for token in loop.tokens] == continuation(PROMPT, 9)
    assert loop.stale == 0


def test_a_rejection_drops_what_was_built_on_it():
    """The same when an id of the block itself is refused."""
    loop, target = Loop(started(), SamplingParams()), Target(list(PROMPT), SamplingParams())
    truth = continuation(PROMPT, 6)
    blocks = [send(loop, [*wrong(truth[:2]), *truth[2:4]]), send(loop, truth[4:]), send(loop, truth[:3])]
    for block in blocks:
        loop.commit(target.judge(block))
    assert [token.id for token in loop.tokens] == truth[:2]
    assert (loop.dropped, loop.stale, loop.applied) == (2, 0, 1)


def test_a_doomed_block_must_not_be_applied():
    """A target that goes on from what it has not committed contradicts itself."""
    loop, target = Loop(started(), SamplingParams()), Target(list(PROMPT), SamplingParams())
    truth = continuation(PROMPT, 9)
    first, second = send(loop, wrong(truth[:4])), send(loop, truth[4:8])
    loop.commit(target.judge(first))
    applied = target.judge(replace(second, last_token_id=truth[3]))
    assert not applied.stale
    with pytest.raises(ProtocolError, match="not under way"):
        loop.commit(applied)


def test_an_unexpected_stale_verdict_drops_what_is_behind_it():
    """A block that should have been applied and was not: all blocks behind it are stale too, and the loop goes on."""
    loop = Loop(started(), SamplingParams())
    truth = continuation(PROMPT, 8)
    first, second = send(loop, truth[:4]), send(loop, truth[4:])
    for block in (first, second):
        loop.commit(Verdict(block.round, True, len(PROMPT), 0, Committed((), "", ())))
    assert (loop.stale, loop.dropped, loop.waiting, loop.open) == (1, 1, 0, True)
    assert send(loop, truth[:4]).base_length == len(PROMPT)


def test_nothing_is_sent_behind_the_last_token():
    """What is assumed counts towards max_new_tokens and the cache as what is committed does."""
    truth = continuation(PROMPT, 20)
    loop = Loop(started(), SamplingParams(max_new_tokens=6))
    send(loop, truth[:4])
    assert (loop.open, loop.limit) == (True, 1)
    send(loop, truth[4:6])
    assert (loop.open, loop.limit) == (False, 0)
    loop = Loop(started(max_length=7), SamplingParams())
    assert loop.limit == 4
    send(loop, truth[:4])
    assert not loop.open


def test_the_end_drops_what_is_under_way():
    """Blocks behind the last token are answered stale, and that is no error."""
    truth = continuation(PROMPT, 8)
    params = SamplingParams(stop_token_ids=(truth[2],))
    loop, target = Loop(started(), params), Target(list(PROMPT), params)
    blocks = [send(loop, truth[:4]), send(loop, truth[4:])]
    loop.commit(target.judge(blocks[0]))
    assert (loop.finish_reason, loop.dropped, loop.open) == (FinishReason.STOP_TOKEN, 1, False)
    assert loop.commit(target.judge(blocks[1])).tokens == ()
    assert loop.stale == 0


def test_plain_steps_need_no_assumption():
    """Each brings one token, whichever it is: their lengths are known, their ids are not, and none is dropped."""
    params = SamplingParams(max_new_tokens=4)
    loop, target = Loop(started(), params), Target(list(PROMPT), params)
    assert not loop.steady
    blocks = [send(loop, ())]
    while loop.steady:
        blocks += unrolled(loop.steps(2))
    assert [(block.base_length, block.last_token_id) for block in blocks] == [(3, 5), (4, None), (5, None), (6, None)]
    for block in blocks:
        assert not loop.open
        loop.commit(target.judge(block))
    assert [token.id for token in loop.tokens] == continuation(PROMPT, 4)
    assert (loop.dropped, loop.stale) == (0, 0)


def test_no_plain_step_follows_what_is_not_one():
    """Behind a block of proposals the length is not known, and behind a guess there is something to continue."""
    loop = Loop(started(), SamplingParams())
    send(loop, (1, 2), ahead=0)
    assert not loop.steady
    loop = Loop(started(), SamplingParams())
    send(loop, (1,), ahead=1)
    assert loop.waiting
    assert not loop.steady


def test_the_end_drops_plain_steps():
    """A stop token among them ends the turn."""
    truth = continuation(PROMPT, 3)
    params = SamplingParams(stop_token_ids=(truth[1],))
    loop, target = Loop(started(), params), Target(list(PROMPT), params)
    blocks = [send(loop, ()), *unrolled(loop.steps(2)), *unrolled(loop.steps(1))]
    for block in blocks:
        loop.commit(target.judge(block))
    assert [token.id for token in loop.tokens] == truth[:2]
    assert (loop.finish_reason, loop.dropped, loop.stale) == (FinishReason.STOP_TOKEN, 2, 0)


def test_nothing_is_assumed_under_the_rejection_rule():
    """A guess of the target's draw would be a draw of its own: nothing is asked ahead."""
    loop = Loop(started(), SamplingParams(rule=AcceptanceRule.REJECTION, temperature=1.0))
    ask = loop.propose(ahead=3)
    assert (ask.ahead, ask.most) == (0, 7)
    send(loop, (1, 2), ahead=3)
    assert not loop.open
