"""Beyond one proposal: guesses made before they are asked for, several proposals for one ask, early ends."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from specpair_draft.asks import Ask, Turn
from specpair_runtime.sampling.params import GREEDY, SamplingBatch, SamplingParams
from specpair_runtime.sampling.processors import process

from ..tiny import VOCABULARY, random_ids
from .conftest import CHUNK, MAX_LENGTH
from .driving import Alone, Company

PARAMS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=1.0, top_k=40, seed=-7),
    "penalized": SamplingParams(temperature=0.9, repetition_penalty=1.4, frequency_penalty=0.3, seed=3),
    "rejection": SamplingParams(temperature=1.1, top_p=0.9, seed=2**40, rejection=True),
}
PROMPT = random_ids(40)


@pytest.fixture(params=PARAMS.values(), ids=PARAMS)
def params(request):
    return request.param


@pytest.fixture
def runner(engine):
    return engine.model.runner


@pytest.fixture
def steps(runner, monkeypatch):
    """The width of every step as they come."""
    seen = []
    logits = runner.logits
    monkeypatch.setattr(runner, "logits", lambda *args: seen.append(args[1].shape[1]) or logits(*args))
    return seen


def draft_of(runner, params=GREEDY, *, run_ahead=True, prompt=PROMPT, **options):
    draft = Alone(runner, 0, CHUNK, run_ahead=run_ahead, **options)
    draft.begin(Turn(prompt, len(prompt), params))
    return draft


# --- ahead of the next ask -------------------------------------------------------------------------------------------


def test_what_came_true_is_there_already(runner, steps, params):
    """When the target accepts all and adds what the draft guessed, the next two proposals cost no step; they are what
    a draft that does not run ahead proposes, sampled from the same distributions."""
    ahead, behind = draft_of(runner, params), draft_of(runner, params, run_ahead=False)
    for _ in range(3):
        proposal, other = ahead.propose(4), behind.propose(4)
        assert proposal.token_ids == other.token_ids
        for one, two in zip(proposal.draft_probs, other.draft_probs, strict=True):
            assert one.token_ids == two.token_ids
            assert one.probs == pytest.approx(two.probs, abs=1e-4)
        bonus = behind.propose(5).token_ids[4]
        for draft in (ahead, behind):
            draft.follow(draft.length, [*proposal.token_ids, bonus])
    company, steps[:] = Company(runner, chunk=CHUNK, run_ahead=True), []
    company.begin(0, Turn(PROMPT, len(PROMPT), params))
    said = company.until(company.ask(0, Ask(40, [], 4))).token_ids[0]
    assert len(steps) == 4
    company.idle()
    # Twice the four that were asked for, and a token of the target's behind each of both proposals.
    assert len(steps) == 4 + 2 * 4 + 2
    guessed = company.sessions[0].path.ids[40:]
    assert guessed[:4] == said
    for start in (5, 10):
        [timed] = company.ask(0, Ask(40 + start - 5, guessed[start - 5 : start], 4 if start == 5 else 3))
        assert timed.proposal.token_ids == guessed[start : start + (4 if start == 5 else 3)]
        assert timed.draft_us == 0
    assert len(steps) == 14


def test_the_part_that_is_there_is_not_made_again(runner, steps):
    """A longer proposal than was made ahead costs the steps that it lacks."""
    draft = draft_of(runner)
    proposed = draft.propose(2).token_ids
    company = draft._company
    ready = company.sessions[0].path.ids[42:]
    assert len(ready) == 2 * 2 + 2
    draft.follow(draft.length, [*proposed, ready[0]])
    steps.clear()
    answers = company.until(company.ask(0, Ask(40, [*proposed, ready[0]], 9)))
    assert steps == [1] * (9 - 5)
    assert answers.token_ids[0][:5] == ready[1:]


def test_what_did_not_come_true_is_dropped(runner, steps, params):
    """The target's own token in its place, wherever that is: what was guessed behind it is forgotten, what stands
    before it stays in the slot, and the proposal is that of a draft that has never guessed."""
    for accepted in range(6):
        draft = draft_of(runner, params)
        proposed = draft.propose(4).token_ids
        path = draft._company.sessions[0].path.ids[40:]
        news = [*path[:accepted], (path[accepted] + 1) % VOCABULARY]
        steps.clear()
        draft.follow(40, news)
        proposal = draft.propose(4)
        # The wrong place is one token: it is fed, and all before it is there.
        assert steps[:4] == [1] * 4
        fresh = draft_of(runner, params, run_ahead=False, prompt=PROMPT)
        fresh.follow(40, news)
        assert proposal.token_ids == fresh.propose(4).token_ids
        assert proposed == path[:4]


def test_it_is_bounded(runner, steps):
    """So far and no further, not beyond the slot, and not at all if it is switched off."""
    for prompt, ahead in ((PROMPT, 8), (random_ids(MAX_LENGTH - 5), 3), (random_ids(MAX_LENGTH - 2), 0)):
        draft = draft_of(runner, prompt=prompt)
        steps.clear()
        draft.propose(3)
        assert len(steps) == 3 + ahead
    draft = draft_of(runner, run_ahead=False)
    steps.clear()
    draft.propose(3)
    assert len(steps) == 3


def test_who_asks_goes_first(runner, steps):
    """Nothing is guessed ahead while a session waits for a proposal or a prompt for its prefill, and pushed proposals
    come before what nobody asked for."""
    company = Company(runner, chunk=CHUNK, run_ahead=True)
    for slot in range(3):
        company.begin(slot, Turn(random_ids(1, seed=slot), 1))
    company.until(company.ask(0, Ask(1, [], 2)))
    # Session 0 could run ahead from here on.
    held = company.sessions[0].path
    pushed = company.ask(1, Ask(1, [], 2, proposals=3))
    asked = company.ask(2, Ask(1, [], 5))
    company.begin(3, Turn(random_ids(3 * CHUNK), 1))
    company.until(asked)
    assert (len(pushed), len(held.ids)) == (1, 3)
    company.until(pushed, 3)
    assert len(held.ids) == 3
    assert company.sessions[3].path.backlog <= 8
    company.idle()
    assert len(held.ids) == 3 + 2 * 2 + 2


def test_a_turn_begins_without_guesses(runner, params):
    """With other parameters the same tokens may go on differently; with the same ones they do not."""
    draft = draft_of(runner, params)
    first = draft.propose(5).token_ids
    draft.begin(Turn(PROMPT, len(PROMPT), replace(params, temperature=1.3, seed=5)))
    other = draft.propose(5).token_ids
    assert other == draft_of(runner, replace(params, temperature=1.3, seed=5)).propose(5).token_ids != first
    draft.begin(Turn(PROMPT, len(PROMPT), params))
    assert draft.propose(5).token_ids == first


def test_a_failure_ahead_hurts_nobody(runner, monkeypatch):
    """What fails while nobody asks is given up; the next ask is answered if it can be."""
    company = Company(runner, chunk=CHUNK, run_ahead=True)
    company.begin(0, Turn(PROMPT, 40))
    first = company.until(company.ask(0, Ask(40, [], 2)))

    def fails(*args):
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(runner, "logits", fails)
        company.idle()
    said = first.token_ids[0]
    again = company.until(company.ask(0, Ask(40, said, 2)))
    draft = draft_of(runner, run_ahead=False)
    draft.follow(40, said)
    assert again.token_ids == [draft.propose(2).token_ids]


# --- several proposals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_ahead", [False, True], ids=["asked", "ahead"])
def test_several_proposals_are_those_asked_for_one_by_one(runner, params, run_ahead):
    """Each continues the one before it as if the target had said exactly its ids, and is as long as was asked."""
    several = draft_of(runner, params, run_ahead=run_ahead).propose_all(3, proposals=5)
    single = draft_of(runner, params, run_ahead=False)
    for proposal in several:
        expected = single.propose(3)
        assert proposal.token_ids == expected.token_ids
        assert len(proposal.draft_probs) == len(expected.draft_probs)
        single.follow(single.length, expected.token_ids)


def test_a_further_ask_ends_the_proposals_of_the_last_one(runner):
    """Nothing more is sent for it, and what it had made is of use if it came true."""
    company = Company(runner, chunk=CHUNK)
    company.begin(0, Turn(PROMPT, 40))
    old = company.until(company.ask(0, Ask(40, [], 2, proposals=16)), 3)
    said = [id_ for ids in old.token_ids for id_ in ids]
    new = company.ask(0, Ask(40, said[:2], 4))
    assert new.token_ids == [said[2:6]]
    company.idle()
    assert len(old) == 3


def test_proposals_end_with_the_slot(runner):
    """The last one that finds room is shorter, and the others are empty; every one of them is sent."""
    prompt = random_ids(MAX_LENGTH - 4)
    proposals = draft_of(runner, prompt=prompt).propose_all(3, proposals=4)
    assert [len(proposal.token_ids) for proposal in proposals] == [3, 2, 0, 0]


def test_positions_and_numbers(runner):
    """Every proposal says which it is and what it continues."""
    company = Company(runner, chunk=CHUNK)
    company.begin(0, Turn(PROMPT, 40))
    answers = company.until(company.ask(0, Ask(38, [5, 6, 7], 2, proposals=3)), 3)
    assert [(timed.index, timed.base_length) for timed in answers.timed] == [(0, 41), (1, 43), (2, 45)]


# --- early ends ------------------------------------------------------------------------------------------------------


@pytest.fixture
def probability_of(tiny):
    """The draft's probability of an id behind some tokens, computed once more."""
    reference = tiny.reference("llama-small")

    def probability(tokens, id_, params):
        scores = reference.logits(tokens)[None, None].float()
        if not params.greedy:
            scores = process(scores, SamplingBatch.of([params], scores.device))
        return float(scores.softmax(dim=-1)[0, 0, id_])

    return probability


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("run_ahead", [False, True], ids=["asked", "ahead"])
def test_a_proposal_ends_before_its_probability_falls_too_low(runner, probability_of, kind, run_ahead):
    """Under the coupled rule: before the first id, but not before the first of all, at which the product of the draft's
    own probabilities falls below the least one. Everything up to there is what is proposed without one."""
    params = PARAMS[kind]
    whole = draft_of(runner, params, run_ahead=False).propose(8).token_ids
    probs = [probability_of([*PROMPT, *whole[:place]], id_, params) for place, id_ in enumerate(whole)]
    products = [math.prod(probs[: count + 1]) for count in range(8)]
    assert products[-1] < 0.5 < 1
    for least in (0.999, *(product * factor for product in products[:5] for factor in (0.99, 1.01))):
        if not 0 < least < 1:
            continue
        proposal = draft_of(runner, params, run_ahead=run_ahead).propose(8, min_confidence=least)
        count = next((place for place, product in enumerate(products) if place and product < least), 8)
        assert proposal.token_ids == whole[:count]
        assert proposal.confidence == pytest.approx(probs[:count], abs=1e-4)


def test_the_rejection_rule_leaves_out_no_sample_for_what_it_is(runner, probability_of):
    """There the id at which the product falls too low is the last one of its proposal. To leave it out would be to
    accept or refuse a place by the sample that was drawn there, and the output would not be the target's any more."""
    params = PARAMS["rejection"]
    whole = draft_of(runner, params, run_ahead=False).propose(8)
    probs = [
        probability_of([*PROMPT, *whole.token_ids[:place]], id_, params) for place, id_ in enumerate(whole.token_ids)
    ]
    products = [math.prod(probs[: count + 1]) for count in range(8)]
    for count in range(1, 5):
        least = products[count - 1] * 1.01
        if least >= 1 or (count > 1 and products[count - 2] < least):
            continue
        proposal = draft_of(runner, params).propose(8, min_confidence=least)
        assert proposal.token_ids == whole.token_ids[:count]
        assert len(proposal.draft_probs) == count


def test_a_proposal_that_ended_early_is_continued(runner):
    """Its followers begin with what it left out, and so does the next ask that says exactly its ids."""
    whole = draft_of(runner, run_ahead=False).propose(12).token_ids
    draft = draft_of(runner)
    proposals = draft.propose_all(4, proposals=3, min_confidence=0.9)
    said = [id_ for proposal in proposals for id_ in proposal.token_ids]
    assert said == whole[: len(said)]
    assert any(len(proposal.token_ids) < 4 for proposal in proposals)
    draft.follow(40, proposals[0].token_ids)
    assert draft.propose(3).token_ids == whole[len(proposals[0].token_ids) :][:3]


def test_confidence_only_where_it_is_asked_for(runner):
    """None of it is computed with 0; guesses that were made without are made again when it counts."""
    draft = draft_of(runner)
    assert draft.propose(4).confidence == []
    with_it = draft.propose(4, min_confidence=1e-30)
    assert len(with_it.confidence) == len(with_it.token_ids) == 4
    assert all(0 < one <= 1 for one in with_it.confidence)
    assert draft.propose(4).confidence == []
    assert draft.propose(6, min_confidence=1e-30).confidence[:4] == pytest.approx(with_it.confidence, abs=1e-5)


def test_confidence_beside_sessions_without(runner):
    """One session's early end is nothing to the other one in its steps."""
    company = Company(runner, chunk=CHUNK)
    for slot in (0, 1):
        company.begin(slot, Turn(random_ids(20, seed=slot), 20, PARAMS["sampled"]))
    careful, plain = company.ask(0, Ask(20, [], 8, min_confidence=0.9)), company.ask(1, Ask(20, [], 8))
    company.until(careful)
    company.until(plain)
    for slot, answers, least in ((0, careful, 0.9), (1, plain, 0.0)):
        draft = draft_of(runner, PARAMS["sampled"], run_ahead=False, prompt=random_ids(20, seed=slot))
        assert answers.token_ids == [draft.propose(8, min_confidence=least).token_ids]
    assert len(careful.token_ids[0]) < len(plain.token_ids[0]) == 8
    assert plain.timed[0].proposal.confidence == []


def test_probabilities_sum_to_one(runner):
    """What the rejection rule's ids were sampled from has each of them in it and no id twice."""
    for proposal in draft_of(runner, PARAMS["rejection"]).propose_all(5, proposals=3):
        assert len(proposal.draft_probs) == len(proposal.token_ids) == 5
        for id_, one in zip(proposal.token_ids, proposal.draft_probs, strict=True):
            assert id_ in one.token_ids
            assert len(set(one.token_ids)) == len(one.token_ids) <= 64
            assert float(torch.tensor(one.probs).sum()) == pytest.approx(1, abs=1e-5)
