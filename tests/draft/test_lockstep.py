"""Sessions that share steps: each is proposed what it is proposed alone, and none holds up or spoils the others."""

from __future__ import annotations

import random

import pytest
import torch

from specpair.errors import InternalError, OverloadedError
from specpair_draft.asks import Ask, Turn
from specpair_runtime.sampling.params import GREEDY, SamplingParams

from ..tiny import VOCABULARY, random_ids
from .conftest import CHUNK, MAX_LENGTH, SLOTS
from .driving import Alone, Company

PARAMS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=1.0, top_k=40, seed=-7),
    "penalized": SamplingParams(temperature=0.9, repetition_penalty=1.4, frequency_penalty=0.3, seed=3),
    "greedy, biased": SamplingParams(presence_penalty=1.5, logit_bias=((5, 2.0), (9, -100.0))),
    "rejection": SamplingParams(temperature=1.1, top_p=0.9, seed=2**40, rejection=True),
}
ROUNDS = 4


@pytest.fixture
def runner(engine):
    return engine.model.runner


@pytest.fixture
def company(runner):
    return Company(runner, chunk=CHUNK)


def steps_of(runner, monkeypatch):
    """The width of every step, and 0 for each chunk of prefill, as they come."""
    seen = []
    logits, prefill = runner.logits, runner.prefill
    monkeypatch.setattr(runner, "logits", lambda *args: seen.append(args[1].shape[1]) or logits(*args))
    monkeypatch.setattr(runner, "prefill", lambda *args: seen.append(0) or prefill(*args))
    return seen


def check_same(proposal, expected):
    """The same ids, from the same distributions but for rounding."""
    assert proposal.token_ids == expected.token_ids
    assert len(proposal.draft_probs) == len(expected.draft_probs)
    for one, other in zip(proposal.draft_probs, expected.draft_probs, strict=True):
        probs = torch.zeros(2, VOCABULARY)
        probs[0, one.token_ids] = torch.tensor(one.probs)
        probs[1, other.token_ids] = torch.tensor(other.probs)
        torch.testing.assert_close(probs[0], probs[1], atol=1e-4, rtol=0)


class Script:
    """What happens to one session, whatever it shares steps with: its lengths and what is accepted are its own."""

    def __init__(self, slot, seed, params):
        self.slot = slot
        self._chance = random.Random(seed)
        prompt = random_ids(self._chance.randrange(1, 90), seed=seed)
        self.turn = Turn(prompt, max(len(prompt) - 3, 1), params)
        self.tokens = list(prompt)

    def ask(self, proposed):
        """The ask behind a round in which `proposed` was judged."""
        news = []
        if proposed is not None:
            accepted = self._chance.randrange(len(proposed) + 1)
            # Sometimes much more than was proposed: another proposer's.
            others = self._chance.choice([0, 0, 0, 3, 12])
            news = [*proposed[:accepted], *(self._chance.randrange(VOCABULARY) for _ in range(1 + others))]
        ask = Ask(len(self.tokens), news, self._chance.randrange(1, 8))
        self.tokens += news
        return ask


def alone(runner, script):
    """Its proposals when there is nobody else."""
    draft = Alone(runner, script.slot, CHUNK)
    draft.begin(script.turn)
    said = []
    for _ in range(ROUNDS):
        ask = script.ask(said[-1].token_ids if said else None)
        draft.follow(ask.from_position, ask.token_ids)
        said.append(draft.propose(ask.max_tokens))
    return said


def alone_with(runner, prompt, count):
    """The first proposal of a greedy session that is by itself."""
    draft = Alone(runner, SLOTS - 1, CHUNK)
    draft.begin(Turn(prompt, 1))
    return draft.propose(count).token_ids


@pytest.mark.parametrize("run_ahead", [False, True], ids=["asked", "ahead"])
@pytest.mark.parametrize("seed", range(5))
def test_sessions_in_lockstep_are_proposed_what_each_is_alone(runner, seed, run_ahead):
    """Sessions of every kind, with lengths of their own, that come and go in the middle of each other's rounds: the
    same ids, and under the rejection rule from the same distributions."""
    kinds = list(PARAMS.values())

    def scripts():
        return [Script(number % SLOTS, 100 * seed + number, kinds[number % len(kinds)]) for number in range(10)]

    expected = [alone(runner, script) for script in scripts()]
    company = Company(runner, chunk=CHUNK, run_ahead=run_ahead)
    chance = random.Random(seed)
    waiting, running, said = list(enumerate(scripts())), {}, [[] for _ in expected]
    while waiting or running:
        busy = {script.slot for script, _ in running.values()}
        if waiting and waiting[0][1].slot not in busy and chance.random() < 0.5:
            number, script = waiting.pop(0)
            company.begin(script.slot, script.turn)
            running[number] = (script, company.ask(script.slot, script.ask(None)))
        # The next step may be anybody's last one, and ends after any step.
        company.interrupted = chance.random() < 0.7
        company.lockstep.turn()
        for number, (script, answers) in list(running.items()):
            if not answers:
                continue
            said[number].append(answers.timed[0].proposal)
            if len(said[number]) < ROUNDS:
                running[number] = (script, company.ask(script.slot, script.ask(said[number][-1].token_ids)))
            else:
                del running[number]
                company.close(script.slot)
    for proposals, others in zip(said, expected, strict=True):
        for proposal, other in zip(proposals, others, strict=True):
            check_same(proposal, other)


def test_those_who_wait_share_steps(runner, company, monkeypatch):
    """As many steps as the longest proposal has ids, however many sessions wait; the shorter ones are done before."""
    for slot in range(SLOTS):
        company.begin(slot, Turn(random_ids(1, seed=slot), 1))
    seen = steps_of(runner, monkeypatch)
    answers = [company.ask(slot, Ask(1, [], 1 + slot)) for slot in range(SLOTS)]
    done = []
    while len(done) < SLOTS:
        assert company.lockstep.turn()
        done += [(slot, len(seen)) for slot in range(SLOTS) if answers[slot] and slot not in dict(done)]
    assert done == [(slot, 1 + slot) for slot in range(SLOTS)]
    assert seen == [1] * SLOTS


def test_who_comes_joins_at_the_next_step(runner, company, monkeypatch):
    """A session that asks while another one's round is under way is in the very next step; no round waits for one."""
    company.begin(0, Turn(random_ids(1), 1))
    company.begin(1, Turn(random_ids(1, seed=1), 1))
    seen = steps_of(runner, monkeypatch)
    company.interrupted = True
    first = company.ask(0, Ask(1, [], 6))
    company.lockstep.turn()
    company.lockstep.turn()
    second = company.ask(1, Ask(1, [], 2))
    company.until(second)
    assert len(seen) == 4
    assert not first
    company.until(first)
    assert len(seen) == 6


def test_catching_up_is_shared(runner, company, monkeypatch):
    """Sessions that lack several ids feed them in one step together; the others go on one id at a time."""
    for slot in range(SLOTS):
        company.begin(slot, Turn(random_ids(1, seed=slot), 1))
    company.idle()
    seen = steps_of(runner, monkeypatch)
    news = [[], [1, 2], [3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]]
    answers = [company.ask(slot, Ask(1, ids, 3)) for slot, ids in enumerate(news)]
    for one in answers:
        company.until(one)
    assert seen == [8, 1, 1, 1]


def test_a_long_prompt_does_not_hold_back_the_rounds_of_others(runner, company, monkeypatch):
    """While one is prefilled there is a step of the other's after every chunk, and a chunk after every step; without
    anybody else the chunks follow each other."""
    company.begin(0, Turn(random_ids(5), 5))
    company.idle()
    seen = steps_of(runner, monkeypatch)
    company.begin(1, Turn(random_ids(MAX_LENGTH - 10), 1))
    long = company.ask(1, Ask(MAX_LENGTH - 10, [], 2))
    tokens = 5
    for _ in range(2):
        short = company.until(company.ask(0, Ask(tokens, [7], 2)))
        tokens += 1
        assert len(short.timed[0].proposal.token_ids) == 2
    # The first round begins with the prompt of five tokens and the news.
    assert seen == [0, 8, 0, 1, 0, 1, 0, 1]
    company.until(long)
    chunks = -(-(MAX_LENGTH - 10 - 9) // CHUNK)
    assert seen.count(0) == chunks
    assert seen[8 : 4 + chunks] == [0] * (chunks - 4)
    assert long.token_ids == [alone_with(runner, random_ids(MAX_LENGTH - 10), 2)]


def test_prompts_take_turns(runner, company, monkeypatch):
    """Several prompts at once are prefilled chunk by chunk in turns: the short one is there first."""
    slots = []
    prefill = runner.prefill
    monkeypatch.setattr(runner, "prefill", lambda *args: slots.append(args[0]) or prefill(*args))
    company.begin(0, Turn(random_ids(4 * CHUNK), 1))
    company.begin(1, Turn(random_ids(2 * CHUNK), 1))
    company.idle()
    assert slots == [0, 1, 0, 1, 0, 0]


def test_a_session_that_ends_in_mid_round_disturbs_nobody(runner, company):
    """Its slot goes to another one at once, and the round of its neighbour is what it would have been."""
    expected = [alone_with(runner, random_ids(12, seed=seed), 6) for seed in (0, 1, 2)]
    company.begin(0, Turn(random_ids(12), 12))
    company.begin(1, Turn(random_ids(12, seed=1), 12))
    company.interrupted = True
    leaving, staying = (company.ask(slot, Ask(12, [], 6)) for slot in (0, 1))
    for _ in range(3):
        company.lockstep.turn()
    company.close(0)
    company.begin(0, Turn(random_ids(12, seed=2), 12))
    arriving = company.until(company.ask(0, Ask(12, [], 6)))
    company.until(staying)
    assert not leaving
    assert staying.token_ids + arriving.token_ids == expected[1:]


class BrokenError(Exception):
    """What an engine may fail with."""


@pytest.mark.parametrize(
    ("error", "told"),
    [(BrokenError(), (InternalError, "ENGINE_FAILED")), (torch.OutOfMemoryError(), (OverloadedError, "OUT_OF_MEMORY"))],
    ids=["engine", "memory"],
)
def test_a_step_that_fails_fails_one_session_alone(runner, company, monkeypatch, error, told):
    """Where a step fails for one of its sessions the others get steps of their own, and the same ids as ever."""
    expected = [alone_with(runner, random_ids(20, seed=seed), 5) for seed in range(SLOTS)]
    for slot in range(SLOTS):
        company.begin(slot, Turn(random_ids(20, seed=slot), 20))
    company.idle()
    logits = runner.logits
    bad = 2

    def step(first_slot, token_ids, starts, length):
        if first_slot <= bad < first_slot + len(starts) and starts[bad - first_slot] != runner.parking:
            raise error
        return logits(first_slot, token_ids, starts, length)

    monkeypatch.setattr(runner, "logits", step)
    answers = [company.ask(slot, Ask(20, [], 5)) for slot in range(SLOTS)]
    for one in answers:
        company.until(one)
    [failure] = answers.pop(bad)
    assert (type(failure), failure.reason) == told
    del expected[bad]
    assert [ids for one in answers for ids in one.token_ids] == expected
    # It stays failed: whoever owns it hears the same again.
    assert company.ask(bad, Ask(20, [], 5)) == [failure]


def test_a_prefill_that_fails_fails_its_session_alone(runner, company, monkeypatch):
    """The next one's prompt is fed as if nothing had been."""
    prefill = runner.prefill

    def chunk(slot, *args):
        if slot == 0:
            raise BrokenError
        return prefill(slot, *args)

    monkeypatch.setattr(runner, "prefill", chunk)
    for slot in (0, 1):
        company.begin(slot, Turn(random_ids(50), 50))
    broken, whole = (company.ask(slot, Ask(50, [], 3)) for slot in (0, 1))
    company.until(broken)
    company.until(whole)
    assert isinstance(broken[0], InternalError)
    monkeypatch.undo()
    assert whole.token_ids == [alone_with(runner, random_ids(50), 3)]


def test_logits_that_are_not_finite_end_their_session_alone(runner, company, monkeypatch):
    """In the middle of a round shared with others, who do not notice."""
    expected = alone_with(runner, random_ids(20, seed=1), 5)
    for slot in (0, 1):
        company.begin(slot, Turn(random_ids(20, seed=slot), 20))
    logits = runner.logits
    left = [3]

    def step(*args):
        result = logits(*args).clone()
        left[0] -= 1
        if left[0] <= 0 and args[0] == 0:
            result[0] = torch.nan
        return result

    monkeypatch.setattr(runner, "logits", step)
    broken, whole = (company.ask(slot, Ask(20, [], 5)) for slot in (0, 1))
    company.until(broken)
    company.until(whole)
    assert [error.reason for error in broken] == ["NON_FINITE_LOGITS"]
    assert whole.token_ids == [expected]
