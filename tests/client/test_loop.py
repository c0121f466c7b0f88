"""Laws of the session: what is asked, sent and believed."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpair.errors import ProtocolError
from specpair.loop import Loop
from specpair.messages import Committed, Proposal, SparseDistribution, Started, Verdict
from specpair.params import AcceptanceRule, SamplingParams
from specpair.results import FinishReason, Logprobs, Source

from .fakes import VOCABULARY, Target, continuation, next_token

PROMPT = (3, 4, 5)


def started(prompt=PROMPT, width=8, max_length=1024):
    return Started("s", tuple(prompt), 0, len(prompt), width - 1, max_length)


def proposal(ask, ids, **changes):
    return replace(Proposal(ask.round, len(ask.token_ids), tuple(ids), Source.MODEL), **changes)


def one_round(loop, target, ids, source=Source.MODEL):
    ask = loop.propose(len(ids))
    block = loop.verify(ask, proposal(ask, ids, source=source))
    return block, loop.commit(target.judge(block))


@given(
    prompt=st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=20),
    max_new_tokens=st.integers(1, 40),
    width=st.integers(1, 9),
    lengths=st.lists(st.integers(0, 12), min_size=1),
    truths=st.lists(st.integers(0, 12), min_size=1),
    junk=st.lists(st.integers(0, 2**32 - 1), max_size=12),
)
def test_the_output_is_the_targets_whatever_is_proposed(prompt, max_new_tokens, width, lengths, truths, junk):
    """For any draft lengths and any proposals, the log is the target's own continuation; each committed token has
    one source, the accepted ones the proposer's, and the counts add up."""
    params = SamplingParams(max_new_tokens=max_new_tokens)
    loop, target = Loop(started(prompt, width), params, vocabulary_size=VOCABULARY), Target(list(prompt), params)
    while loop.finish_reason is None:
        ask = loop.propose(lengths[loop.round % len(lengths)])
        assert ask.max_tokens <= min(width - 1, max_new_tokens - len(loop.tokens) - 1)
        truth = continuation(loop.token_ids, truths[loop.round % len(truths)])
        block = loop.verify(ask, proposal(ask, [*truth, *junk]))
        assert len(block.token_ids) <= ask.max_tokens
        assert all(id_ < VOCABULARY for id_ in block.token_ids)
        assert (block.base_length, block.last_token_id) == (len(loop.token_ids), loop.token_ids[-1])
        loop.commit(target.judge(block))
    assert [token.id for token in loop.tokens] == continuation(prompt, max_new_tokens)
    assert loop.token_ids == target.log
    assert sum(token.source is Source.MODEL for token in loop.tokens) == loop.accepted <= loop.proposed
    assert loop.applied == loop.round
    assert loop.finish_reason is FinishReason.MAX_NEW_TOKENS


def test_accepted_ids_carry_the_source_of_their_block():
    """The first `accepted` tokens of a verdict are the proposer's, the one behind them the target's."""
    loop, target = Loop(started(), SamplingParams()), Target(list(PROMPT), SamplingParams())
    truth = continuation(PROMPT, 4)
    _, chunk = one_round(loop, target, [*truth[:2], (truth[2] + 1) % VOCABULARY], Source.NGRAM)
    assert [token.source for token in chunk.tokens] == [Source.NGRAM, Source.NGRAM, Source.TARGET]
    assert [token.id for token in chunk.tokens] == truth[:3]
    assert (loop.proposed, loop.accepted) == (3, 2)


def test_a_draft_cannot_speak_as_the_target():
    """Whatever source it claims, an accepted proposal is never counted as the target's own."""
    loop, target = Loop(started(), SamplingParams()), Target(list(PROMPT), SamplingParams())
    _, chunk = one_round(loop, target, continuation(PROMPT, 2), Source.TARGET)
    assert [token.source for token in chunk.tokens] == [Source.MODEL, Source.MODEL, Source.TARGET]


def test_a_block_without_proposals_is_a_plain_step():
    """Without a proposal the block is empty, its source the target, and one token comes back."""
    loop, target = Loop(started(), SamplingParams()), Target(list(PROMPT), SamplingParams())
    block = loop.verify(loop.propose(0), None)
    assert (block.token_ids, block.source) == ((), Source.TARGET)
    assert [token.source for token in loop.commit(target.judge(block)).tokens] == [Source.TARGET]


@pytest.mark.parametrize("wrong", [{"round": 7}, {"base_length": 2}, {"base_length": 4}])
def test_a_proposal_for_something_else_is_dropped(wrong):
    """A proposal of another round or for another length proposes nothing, and is no error."""
    loop = Loop(started(), SamplingParams())
    ask = loop.propose(4)
    assert loop.verify(ask, proposal(ask, [1, 2], **wrong)).token_ids == ()


def test_a_proposal_ends_at_the_first_id_outside_the_vocabulary():
    """What follows an impossible id was proposed behind it, and goes with it."""
    loop = Loop(started(), SamplingParams(), vocabulary_size=VOCABULARY)
    ask = loop.propose(4)
    assert loop.verify(ask, proposal(ask, [1, VOCABULARY - 1, VOCABULARY, 2])).token_ids == (1, VOCABULARY - 1)


def test_no_more_is_asked_than_can_be_used():
    """k is limited by the block, by the cache, and by max_new_tokens less the target's own token."""
    assert Loop(started(width=4), SamplingParams()).propose(9).max_tokens == 3
    assert Loop(started(max_length=5), SamplingParams()).propose(9).max_tokens == 2
    assert Loop(started(max_length=3), SamplingParams()).propose(9).max_tokens == 0
    assert Loop(started(), SamplingParams(max_new_tokens=3)).propose(9).max_tokens == 2
    assert Loop(started(), SamplingParams(max_new_tokens=1)).propose(9).max_tokens == 0
    assert Loop(started(), SamplingParams(max_new_tokens=0)).propose(9).max_tokens == 0


def test_the_rejection_rule_sends_what_was_sampled_from():
    """Draft probabilities travel with their ids; a proposer without any was certain."""
    loop = Loop(started(), SamplingParams(rule=AcceptanceRule.REJECTION))
    q = SparseDistribution((7, 8), (0.5, 0.5))
    ask = loop.propose(3)
    block = loop.verify(ask, proposal(ask, [7, 8, 7], draft_probs=(q, q)))
    assert (block.token_ids, block.draft_probs) == ((7, 8), (q, q))
    block = loop.verify(ask, proposal(ask, [7, 8], source=Source.NGRAM))
    assert (block.token_ids, block.draft_probs, block.source) == ((7, 8), (), Source.NGRAM)
    block = loop.verify(ask, None)
    assert (block.token_ids, block.draft_probs, block.source) == ((), (), Source.TARGET)


def test_the_coupled_rule_sends_no_probabilities():
    """Nobody needs them there, and the target refuses them."""
    loop = Loop(started(), SamplingParams())
    ask = loop.propose(1)
    block = loop.verify(ask, proposal(ask, [7], draft_probs=(SparseDistribution((7,), (1.0,)),)))
    assert (block.token_ids, block.draft_probs) == ((7,), ())


IMPLAUSIBLE = {
    "more ids than probabilities": SparseDistribution((7, 8), (1.0,)),
    "more probabilities than ids": SparseDistribution((7,), (0.5, 0.5)),
    "an id twice": SparseDistribution((7, 7), (0.5, 0.5)),
    "an id outside the vocabulary": SparseDistribution((7, VOCABULARY), (0.5, 0.5)),
    "too many ids": SparseDistribution(tuple(range(65)), (1 / 65,) * 65),
    "too little in sum": SparseDistribution((7, 8), (0.5, 0.4)),
    "too much in sum": SparseDistribution((7, 8), (0.5, 0.6)),
    "less than nothing": SparseDistribution((7, 8, 9), (0.75, 0.5, -0.25)),
    "not a number": SparseDistribution((7, 8), (0.5, float("nan"))),
    "infinity": SparseDistribution((7, 8), (float("inf"), 0.0)),
    "another id alone": SparseDistribution((8,), (1.0,)),
    "nothing for the id": SparseDistribution((7, 8), (0.0, 1.0)),
    "nothing at all": SparseDistribution((), ()),
}


@pytest.mark.parametrize("name", IMPLAUSIBLE)
def test_a_proposal_ends_at_the_first_distribution_that_cannot_be(name):
    """The target would refuse the block: what a draft says costs speed, never an error."""
    loop = Loop(
        started(), SamplingParams(rule=AcceptanceRule.REJECTION), vocabulary_size=80 if "many" in name else VOCABULARY
    )
    ask = loop.propose(3)
    good = SparseDistribution((6, 7), (0.25, 0.75))
    block = loop.verify(ask, proposal(ask, [6, 7, 6], draft_probs=(good, IMPLAUSIBLE[name], good)))
    assert (block.token_ids, block.draft_probs) == ((6,), (good,))


@given(st.lists(st.floats(0.0, 1.0, width=32), min_size=1, max_size=64).filter(lambda weights: weights[0] > 0.01))
def test_distributions_rounded_to_float32_pass(weights):
    """What a draft has normalised before it was sent arrives with rounding errors only."""
    total = sum(weights)
    probs = tuple(struct.unpack("f", struct.pack("f", weight / total))[0] for weight in weights)
    loop = Loop(started(), SamplingParams(rule=AcceptanceRule.REJECTION), vocabulary_size=80)
    ask = loop.propose(1)
    q = SparseDistribution(tuple(range(len(probs))), probs)
    assert loop.verify(ask, proposal(ask, [0], draft_probs=(q,))).draft_probs == (q,)


def next_turn(loop, target, prompt, params=None, **changes):
    params = params or SamplingParams()
    kept = target.extend(prompt, params)
    answer = Started("s", tuple(target.log[kept:]), kept, len(target.log), 7, 1024)
    return Loop(replace(answer, **changes), params, last=loop)


@given(
    prompts=st.lists(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=8), min_size=1, max_size=4),
    lengths=st.lists(st.integers(0, 9), min_size=1),
    count=st.integers(1, 12),
)
def test_a_turn_goes_on_behind_the_last_one(prompts, lengths, count):
    """The log is everything so far, the output the target's continuation of it, and no round comes twice."""
    params = SamplingParams(max_new_tokens=count)
    target, loop, log, rounds = Target(list(PROMPT), params), Loop(started(), params), list(PROMPT), []
    for prompt in (None, *prompts):
        if prompt is not None:
            loop = next_turn(loop, target, prompt, params)
            log += prompt
        assert (loop.token_ids, loop.prompt_length) == (log, len(log))
        assert (loop.tokens, loop.finish_reason, loop.accepted) == ([], None, 0)
        while loop.finish_reason is None:
            length = lengths[loop.round % len(lengths)]
            block, _ = one_round(loop, target, continuation(loop.token_ids, length)[: loop.limit])
            rounds.append(block.round)
        assert [token.id for token in loop.tokens] == continuation(log, count)
        log += [token.id for token in loop.tokens]
    assert len(set(rounds)) == len(rounds)


def test_a_conversation_may_be_rendered_otherwise_than_it_was_generated():
    """What the target says from position cached_tokens on replaces what stood there."""
    said = [{"role": "user", "content": "a"}]
    target = Target.of(said, SamplingParams())
    loop = Loop(started(target.log), SamplingParams())
    one_round(loop, target, continuation(loop.token_ids, 3))
    generated = list(loop.token_ids)
    loop = next_turn(loop, target, [{"role": "user", "content": "b"}])
    assert loop.token_ids == target.log
    assert loop.token_ids[: len(generated)] != generated


@pytest.mark.parametrize(
    "wrong",
    [
        {"length": 4},
        {"length": 6},
        {"cached_tokens": 2},
        {"cached_tokens": 5, "length": 7},
        {"cached_tokens": 99, "length": 5},
        {"prompt_token_ids": ()},
    ],
)
def test_a_turn_that_starts_elsewhere_is_refused(wrong):
    """More tokens that stay than there are, or a length that is not theirs and the new ones'."""
    loop, target = Loop(started(), SamplingParams()), Target(list(PROMPT), SamplingParams())
    one_round(loop, target, [])
    with pytest.raises(ProtocolError):
        next_turn(loop, target, [9], **wrong)


def lie(**changes):
    return lambda verdict: replace(verdict, **changes)


def lie_in_tokens(**changes):
    return lambda verdict: replace(verdict, committed=replace(verdict.committed, **changes))


LIES = {
    "another round": lie(round=9),
    "another base": lie(base_length=4),
    "more accepted than proposed": lie(accepted=4),
    "other ids than proposed": lambda v: lie_in_tokens(token_ids=v.committed.token_ids[::-1])(v),
    "no token of its own": lie(accepted=3),
    "too many tokens": lie(accepted=1),
    "texts for other tokens": lie_in_tokens(text_lengths=(1,)),
    "more text than its lengths": lie_in_tokens(text_delta="?" * 100),
    "log probabilities for other tokens": lie_in_tokens(logprobs=(Logprobs(-1.0),)),
    "stale at another length": lie(stale=True, base_length=4),
}


@pytest.mark.parametrize("name", LIES)
def test_a_verdict_that_contradicts_the_state_is_refused(name):
    """Nothing is committed from a verdict that cannot be true."""
    loop, target = Loop(started(), SamplingParams()), Target(list(PROMPT), SamplingParams())
    truth = continuation(PROMPT, 2)
    ask = loop.propose(3)
    verdict = target.judge(loop.verify(ask, proposal(ask, [*truth, (next_token([*PROMPT, *truth]) + 1) % VOCABULARY])))
    assert verdict.accepted == 2
    with pytest.raises(ProtocolError):
        loop.commit(LIES[name](verdict))
    assert loop.token_ids == list(PROMPT)
    assert loop.tokens == []


def test_a_turn_may_end_inside_an_accepted_block():
    """With a finish reason the last committed token may be an accepted one; nothing comes after it."""
    truth = continuation(PROMPT, 5)
    params = SamplingParams(stop_token_ids=(truth[2],))
    loop, target = Loop(started(), params), Target(list(PROMPT), params)
    _, chunk = one_round(loop, target, truth)
    assert [token.id for token in chunk.tokens] == truth[:3]
    assert {token.source for token in chunk.tokens} == {Source.MODEL}
    assert loop.finish_reason is chunk.finish_reason is FinishReason.STOP_TOKEN
    with pytest.raises(ProtocolError):
        loop.append(Committed((1,), "", (0,)))


def test_a_turn_may_end_without_a_token():
    """A cache that is full from the start ends the turn with nothing."""
    loop = Loop(started(), SamplingParams())
    loop.verify(loop.propose(0), None)
    chunk = loop.commit(Verdict(1, False, 3, 0, Committed((), "", (), (), FinishReason.CACHE_FULL)))
    assert chunk.tokens == ()
    assert loop.finish_reason is FinishReason.CACHE_FULL


def test_a_stale_block_costs_a_round_and_nothing_else():
    """A stale verdict at the same length adds nothing and the loop proposes anew; a second one in a row is a
    contradiction."""
    loop, target = Loop(started(), SamplingParams()), Target(list(PROMPT), SamplingParams())
    stale = Verdict(1, True, len(PROMPT), 0, Committed((), "", ()))
    loop.verify(loop.propose(0), None)
    assert loop.commit(stale).tokens == ()
    assert not loop.waiting
    assert loop.stale == 1
    _, chunk = one_round(loop, target, [])
    assert [token.id for token in chunk.tokens] == continuation(PROMPT, 1)
    for number in (3, 4):
        loop.verify(loop.propose(0), None)
        verdict = replace(stale, round=number, base_length=len(PROMPT) + 1)
        if number == 3:
            loop.commit(verdict)
    with pytest.raises(ProtocolError):
        loop.commit(verdict)


def test_the_echo_of_a_duplicated_block_is_passed_over():
    """A stale verdict on an earlier round, as a duplicated message causes, leaves the block under way alone."""
    loop, target = Loop(started(), SamplingParams()), Target(list(PROMPT), SamplingParams())
    first, _ = one_round(loop, target, continuation(PROMPT, 2))
    block = loop.verify(loop.propose(0), None)
    assert loop.commit(target.judge(first)).tokens == ()
    assert loop.waiting
    loop.commit(target.judge(block))
    assert [token.id for token in loop.tokens] == continuation(PROMPT, 4)


def test_texts_are_cut_by_code_points():
    """Each token carries as many code points of the delta as the target says, held back text included."""
    loop = Loop(started(), SamplingParams())
    chunk = loop.append(Committed((1, 2, 3), "aé\N{GRINNING FACE}b", (0, 3, 1)))
    assert [token.text for token in chunk.tokens] == ["", "aé\N{GRINNING FACE}", "b"]


def test_a_session_that_starts_elsewhere_is_refused():
    """The log must be the whole session."""
    with pytest.raises(ProtocolError):
        Loop(replace(started(), length=9), SamplingParams())
    with pytest.raises(ProtocolError):
        Loop(Started("s", (), 0, 0, 7, 10), SamplingParams())
    with pytest.raises(ProtocolError):
        Loop(replace(started(), cached_tokens=2, length=5), SamplingParams())


@pytest.mark.parametrize("base_length", [0, 3, 5, 6])
def test_plain_tokens_that_do_not_continue_the_log_are_refused(base_length):
    """A response that was lost on the way, or came twice, is noticed by where the next one stands."""
    loop = Loop(started(), SamplingParams())
    loop.append(Committed((7,), "a", (1,), base_length=3))
    with pytest.raises(ProtocolError):
        loop.append(Committed((8,), "b", (1,), base_length=base_length))
    loop.append(Committed((8,), "b", (1,), base_length=4))
    assert loop.token_ids == [*PROMPT, 7, 8]
