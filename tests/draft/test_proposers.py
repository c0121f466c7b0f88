"""What a session is proposed depends on the tokens that it follows, not on how it came to follow them."""

from __future__ import annotations

import random

import pytest
import torch

from specpair.errors import InternalError
from specpair_draft.asks import Turn
from specpair_runtime.sampling.params import GREEDY, SamplingParams

from .. import plain
from ..tiny import VOCABULARY, random_ids
from .conftest import CHUNK, MAX_LENGTH, SLOTS
from .driving import Alone

PARAMS = {
    "greedy": GREEDY,
    "temperature": SamplingParams(temperature=1.0, seed=-7),
    "all": SamplingParams(temperature=1.3, top_k=30, top_p=0.95, min_p=0.01, seed=2**40),
}


@pytest.fixture(params=PARAMS.values(), ids=PARAMS)
def params(request):
    return request.param


@pytest.fixture
def naive(tiny):
    """Decodes from scratch with transformers, one forward pass over everything for each token."""
    reference = tiny.reference("llama-small")

    def decode(tokens, count, params):
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(plain.choose(reference.logits(tokens), len(tokens), params))
        return tokens[-count:]

    return decode


def proposer_of(engine, slot=0, **options):
    return Alone(engine.model.runner, slot, CHUNK, **options)


class Session:
    """A session whose draft is checked against naive decoding after every turn of events."""

    def __init__(self, engine, naive, prompt, params, slot=0, **options):
        self.tokens = list(prompt)
        self.proposer = proposer_of(engine, slot, **options)
        self._naive, self._params = naive, params
        self.begin()

    def begin(self):
        self.proposer.begin(Turn(self.tokens, len(self.tokens), self._params))

    def follow(self, from_position, ids):
        self.tokens[from_position:] = ids
        self.proposer.follow(from_position, ids)

    def propose(self, count):
        proposed = self.proposer.propose(count).token_ids
        assert proposed == self._naive(self.tokens, count, self._params)
        return proposed


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, CHUNK, CHUNK + 1, 2 * CHUNK + 9, 100, 250, 255, 256, 257])
def test_proposals_are_naive_decoding(engine, naive, params, length):
    """From a prompt of any length, around chunks, around the rows of a step and the first attended length."""
    Session(engine, naive, random_ids(length), params).propose(6)


def test_after_full_acceptance(engine, naive, params):
    """The draft has never fed its own last token when all its tokens are accepted; it does so before it goes on."""
    session = Session(engine, naive, random_ids(20), params)
    for count in (1, 2, 7, 1, 1, 8, 9, 3):
        proposed = session.propose(count)
        session.follow(len(session.tokens), [*proposed, *naive([*session.tokens, *proposed], 1, GREEDY)])
    for count in (3, 1, 5):
        # The bonus token is what the draft would have said itself.
        proposed = session.propose(count + 1)
        session.follow(len(session.tokens), proposed)


def test_after_rejection_anywhere(engine, naive, params):
    """However many tokens are accepted and whatever replaces the next one."""
    session = Session(engine, naive, random_ids(20, seed=1), params)
    for accepted in (0, 3, 5, 1, 0, 0, 4):
        proposed = session.propose(6)
        session.follow(len(session.tokens), [*proposed[:accepted], (proposed[accepted] + 1) % VOCABULARY])


def test_after_a_round_without_news(engine, naive, params):
    """The same question has the same answer, shorter and longer ones included."""
    session = Session(engine, naive, random_ids(33), params)
    for count in (4, 4, 7, 1, 2):
        session.follow(33, [])
        session.propose(count)


def test_after_many_tokens_at_once(engine, naive, params):
    """Tokens that others proposed come in any number, more than a step or a chunk feeds."""
    session = Session(engine, naive, random_ids(5), params)
    for count in (1, 7, 8, 9, 10, CHUNK + 8, 2 * CHUNK):
        session.follow(len(session.tokens), random_ids(count, seed=count))
        session.propose(2)


@pytest.mark.parametrize("run_ahead", [False, True], ids=["asked", "ahead"])
@pytest.mark.parametrize("seed", range(6))
def test_any_history(engine, naive, params, seed, run_ahead):
    """Acceptance, rejection, and replacement from any earlier position, in any order, whether the draft runs ahead."""
    chance = random.Random(seed)
    prompt = random_ids(chance.randrange(1, 60), seed=seed)
    session = Session(engine, naive, prompt, params, slot=seed % SLOTS, run_ahead=run_ahead)
    for _ in range(10):
        event = chance.choice(["round", "round", "replace", "shorten", "begin"])
        length = len(session.tokens)
        if event == "round":
            proposed = session.propose(chance.randrange(1, 9))
            accepted = chance.randrange(len(proposed) + 1)
            session.follow(length, [*proposed[:accepted], chance.randrange(VOCABULARY)])
        elif event == "replace":
            start = chance.randrange(length)
            session.follow(start, chance.choices(range(VOCABULARY), k=chance.randrange(1, 30)))
        elif event == "shorten":
            session.follow(chance.randrange(1, length + 1), [])
        else:
            session.tokens += chance.choices(range(VOCABULARY), k=chance.randrange(1, 20))
            session.begin()
    session.propose(5)


def test_sessions_do_not_see_each_other(engine, naive):
    """Sessions on all slots that take turns propose what each proposes alone; so does the next one on a used slot."""
    for seed in (0, 1):
        sessions = [
            Session(engine, naive, random_ids(10 + 40 * slot, seed=seed), params, slot)
            for slot, params in zip(range(SLOTS), [*PARAMS.values(), GREEDY], strict=True)
        ]
        for _ in range(3):
            for session in sessions:
                session.follow(len(session.tokens), [*session.propose(3)[:2], 5])


def test_what_a_slot_held_before_does_not_matter(load, naive):
    """Not even numbers that are none, left behind by a session that the model could not follow."""
    engine = load("llama-small", slots=1)
    embedding = engine.model.loaded.model.get_input_embeddings().weight
    poison = 3
    with torch.no_grad():
        embedding[poison] = torch.nan
    prompts = [[id_ for id_ in random_ids(length) if id_ != poison] for length in (200, 5, 60)]
    broken = proposer_of(engine)
    broken.begin(Turn([poison, *prompts[0]], 1, GREEDY))
    with pytest.raises(InternalError) as error:
        broken.propose(2)
    assert error.value.reason == "NON_FINITE_LOGITS"
    for prompt in prompts:
        Session(engine, naive, prompt, GREEDY).propose(3)


@pytest.mark.parametrize("missing", [0, 1, 2, 8, 9])
def test_nothing_is_proposed_beyond_the_slot(engine, naive, params, missing):
    """A prompt that leaves room for so many tokens gets as many proposals and the one that needs no position; behind
    that none, and back from there as many again."""
    prompt = random_ids(MAX_LENGTH - missing)
    session = Session(engine, naive, prompt, params)
    expected = naive(prompt, missing + 1, params)
    assert session.proposer.propose(64).token_ids == expected
    session.follow(len(prompt), expected)
    assert session.proposer.propose(64).token_ids == []
    session.follow(MAX_LENGTH - missing - 1, [7])
    assert session.proposer.propose(64).token_ids == naive(session.tokens, missing + 1, params)


def test_a_session_longer_than_the_slot(engine, naive, monkeypatch):
    """It gets no proposals, costs no forward pass, and is followed all the same."""
    session = Session(engine, naive, random_ids(2 * MAX_LENGTH), GREEDY, run_ahead=True)
    with monkeypatch.context() as patch:
        patch.setattr(engine.model.runner, "logits", None)
        patch.setattr(engine.model.runner, "prefill", None)
        assert session.proposer.propose(8).token_ids == []
        session.follow(2 * MAX_LENGTH, [1, 2, 3])
        assert [one.token_ids for one in session.proposer.propose_all(8, proposals=3)] == [[], [], []]
    session.follow(MAX_LENGTH - 3, [])
    session.propose(4)


def test_only_what_is_new_is_computed(engine, monkeypatch):
    """A round after full acceptance costs one forward pass for each proposal: the cache of guesses that came true
    stays."""
    runner = engine.model.runner
    fed = []
    logits, prefill = runner.logits, runner.prefill
    monkeypatch.setattr(runner, "logits", lambda *args: fed.append(args[1].shape[1]) or logits(*args))
    monkeypatch.setattr(runner, "prefill", lambda *args: fed.append(len(args[1])) or prefill(*args))
    proposer = proposer_of(engine)
    proposer.begin(Turn(random_ids(CHUNK + 1), CHUNK + 1))
    proposed = proposer.propose(4).token_ids
    assert fed == [CHUNK, 1, 1, 1, 1]
    fed.clear()
    proposer.follow(CHUNK + 1, [*proposed, 9])
    proposed = proposer.propose(3).token_ids
    # Its own last token and the bonus token in one step, then one by one.
    assert fed == [8, 1, 1]
    fed.clear()
    proposer.follow(CHUNK + 6, [proposed[0], (proposed[1] + 1) % VOCABULARY])
    proposer.propose(2)
    assert fed == [1, 1]
