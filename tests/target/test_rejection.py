"""The rejection rule in whole blocks: several tokens at a time have the target's joint distribution."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from specpair_draft.asks import Turn
from specpair_draft.steps import STEP_WIDTHS
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.serving_model import load_serving_model
from specpair_runtime.sampling.law import acceptance_probability, residual_weights
from specpair_runtime.sampling.noise import Stream
from specpair_runtime.sampling.params import SamplingBatch, SamplingParams
from specpair_runtime.sampling.processors import process
from specpair_runtime.serving import ServiceStatus
from specpair_target.sessions import TurnOptions
from specpair_target.verifier import Row, Verifier

from ..draft.driving import Alone
from ..plain import gumbel, uniform, warped
from ..rejecting import propose_by_rejection
from ..sampling.chi_square import chi_square
from ..sampling.penalties import reference_penalties
from ..tiny import random_ids
from .driving import open_session, together
from .guessing import Guesser, best_of, told

CPU = torch.device("cpu")
PASSES = 1e-3


# --- a model that is a table ---------------------------------------------------------------------------------------

IDS, WIDTH, FIRST, START = 4, 4, 2, 11
SESSIONS = 1200


class Table:
    """A model whose next token depends on the last one alone: logits of [ids, ids]."""

    def __init__(self, seed, near=None, distance=1.0):
        drawn = torch.randn((IDS, IDS), generator=torch.Generator().manual_seed(seed)) * 1.5
        self.table = drawn if near is None else near.table + distance * drawn

    def logits(self, first_slot, token_ids, starts, length):
        return self.table[token_ids]

    def probs(self, params):
        """What it says behind each id, [ids, ids], in double precision."""
        return warped(self.table, params).double().softmax(dim=-1)


def rounds_with(target, propose, params, tokens):
    """What sessions of many seeds say in their first `tokens` places, and how many proposals were accepted of how
    many. Blocks have 0 to 3 proposals in turn; a session's rounds go on until it has said enough."""
    verifier = Verifier(target, WIDTH)
    said = [[FIRST] for _ in range(SESSIONS)]
    accepted = proposed = count = 0
    while waiting := [seed for seed, ids in enumerate(said) if len(ids) <= tokens]:
        rows = []
        for seed in waiting:
            own = replace(params, seed=seed)
            position = START + len(said[seed])
            ids, draft_probs = propose(said[seed][-1], position, own, (seed + count) % WIDTH)
            rows.append(Row(position - 1, [said[seed][-1], *ids], own, draft_probs=draft_probs))
        for seed, row, judgement in zip(waiting, rows, verifier.verify(0, rows, 256), strict=True):
            said[seed] += judgement.token_ids
            accepted += judgement.accepted
            proposed += len(row.token_ids) - 1
        count += 1
    return [tuple(ids[1 : tokens + 1]) for ids in said], accepted, proposed


def by_sampling(draft):
    """A draft model of its own, which samples what it proposes."""

    def propose(last, position, params, most):
        batch, ids, sent = SamplingBatch.of([params], CPU), [], []
        for place in range(most):
            scores = process(draft.table[last][None, None], batch)
            last, probs = propose_by_rejection(scores, torch.tensor([[position + place]]), batch)
            ids.append(last)
            sent.append(probs)
        return ids, sent

    return propose


def by_heart(ids):
    """A proposer that is certain, as prompt lookup is: always the same ids, and no probabilities."""
    return lambda last, position, params, most: (ids[:most], ())


TARGET = Table(1)
DRAFTS = {
    "good": by_sampling(Table(2, near=TARGET, distance=0.3)),
    "bad": by_sampling(Table(3)),
    "equal": by_sampling(TARGET),
    "certain": by_heart([0, 3, 1]),
}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, rejection=True),
        SamplingParams(temperature=1.8, top_k=3, rejection=True),
        SamplingParams(temperature=0.7, top_p=0.9, min_p=0.02, rejection=True),
    ],
    ids=["plain", "top-k", "top-p"],
)
def test_several_tokens_have_the_targets_joint_distribution(draft, params):
    """The first three tokens of a session, said in blocks of any length, are distributed as the target alone would
    say them, whatever the draft. A draft that equals the target is always accepted."""
    said, accepted, proposed = rounds_with(TARGET, DRAFTS[draft], params, tokens=3)
    probs = TARGET.probs(params)
    expected = {
        (a, b, c): float(probs[FIRST, a] * probs[a, b] * probs[b, c]) for a, b, c in product(range(IDS), repeat=3)
    }
    number = {triple: index for index, triple in enumerate(expected)}
    assert chi_square([number[triple] for triple in said], list(expected.values())) > PASSES
    assert 0 < accepted <= proposed
    assert (accepted == proposed) == (draft == "equal")


# --- a model over a slot cache -------------------------------------------------------------------------------------

SEEDS = 320
PROMPT = random_ids(6, seed=5)
# Hot, since the tiny models are sure of themselves.
PARAMS = SamplingParams(temperature=8.0, top_k=3, rejection=True)
KINDS = {
    "the same model": ("llama", PARAMS),
    "the same model, warmer": ("llama", replace(PARAMS, temperature=16.0, top_k=6)),
    "another model": ("llama-small", replace(PARAMS, top_k=0)),
}


@pytest.fixture(scope="module")
def draft_runner(tiny):
    """A draft's runner on a tiny model."""

    def load(name):
        config = ModelConfig(model=tiny.path(name), dtype="fp32", device="cpu", slots=1, max_length=64, threads=1)
        return load_serving_model(config, STEP_WIDTHS, ServiceStatus()).runner

    return load


def pairs(reference, params):
    """Probabilities of the first two tokens behind PROMPT, {(first, second): probability}."""
    first = warped(reference.logits(PROMPT)[None], params)[0].softmax(dim=-1)
    found = {}
    for one in first.nonzero()[:, 0].tolist():
        second = warped(reference.logits([*PROMPT, one])[None], params)[0].softmax(dim=-1)
        found |= {(one, two): float(first[one] * second[two]) for two in second.nonzero()[:, 0].tolist()}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_have_the_targets_joint_distribution(tiny, engine_of, draft_runner, kind):
    """Over sessions of many seeds on the engine, with a draft service's own proposer, the first two tokens have the
    distribution that transformers computes. A draft that runs the target's model is always accepted."""
    name, draft_params = KINDS[kind]
    engine, runner = engine_of("llama"), draft_runner(name)
    expected = pairs(tiny.reference("llama"), PARAMS)
    number = {pair: index for index, pair in enumerate(expected)}
    said, accepted, proposed = [], 0, 0

    async def first_two(seed):
        nonlocal accepted, proposed
        session = await open_session(engine, PROMPT, TurnOptions(sampling=replace(PARAMS, seed=seed)))
        try:
            while session.length < len(PROMPT) + 2:
                proposer = Alone(runner, 0, 32)
                proposer.begin(Turn(session.tokens, len(PROMPT), replace(draft_params, seed=seed)))
                proposal = proposer.propose(2)
                verification = await engine.verify(session, proposal.token_ids, proposal.draft_probs)
                accepted += verification.judgement.accepted
                proposed += len(proposal.token_ids)
            said.append(tuple(session.tokens[len(PROMPT) : len(PROMPT) + 2]))
        finally:
            engine.close(session)

    for seed in range(0, SEEDS, engine.pool.slots):
        together(*(first_two(seed + slot) for slot in range(engine.pool.slots)))
    assert set(said) <= expected.keys()
    assert chi_square([number[pair] for pair in said], list(expected.values())) > PASSES
    assert (accepted == proposed) == (kind == "the same model")


# --- verdict by verdict --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=2.0, rejection=True),
        SamplingParams(temperature=8.0, top_k=3, top_p=0.95, rejection=True),
        SamplingParams(temperature=1.0, repetition_penalty=1.3, frequency_penalty=1.0, rejection=True),
    ],
    ids=["plain", "truncated", "penalized"],
)
def test_every_verdict_is_the_law(tiny, engine_of, params):
    """In every round of sessions side by side, the engine accepts the proposals that the law accepts, with
    probabilities that transformers computes and noise in plain integers, and puts the law's token behind them."""
    reference, engine = tiny.reference("llama"), engine_of("llama")
    prompts = [random_ids(length, seed=6) for length in (1, 4, 20, 40)]
    turns = [TurnOptions(sampling=replace(params, seed=seed), max_new_tokens=30) for seed in range(len(prompts))]
    heard = together(
        *(
            told(engine, prompt, turn, Guesser((), turn.sampling.seed, True, best_of(reference)))
            for prompt, turn in zip(prompts, turns, strict=True)
        )
    )
    for prompt, turn, session in zip(prompts, turns, heard, strict=True):
        for one in session.rounds:
            expected = by_the_law(reference, len(prompt), turn.sampling, one)
            assert (one.judgement.accepted, one.judgement.token_ids) == expected
    judgements = [(len(one.proposal), one.judgement.accepted) for session in heard for one in session.rounds]
    assert any(0 < accepted < proposed for proposed, accepted in judgements)
    assert any(0 < accepted == proposed for proposed, accepted in judgements)


def by_the_law(reference, prompt_length, params, one):
    """How many proposals of a round are accepted, and the round's tokens."""
    penalize = reference_penalties(params, prompt_length, ())
    for place in range(len(one.proposal) + 1):
        before = [*one.tokens, *one.proposal[:place]]
        scores = warped(penalize(torch.tensor([before]), reference.logits(before)[None]), params)[0]
        target = scores.softmax(dim=-1).tolist()
        seed, position = params.seed, len(before)
        if place == len(one.proposal):
            return place, [*one.proposal, _draw(target, seed, position, Stream.TARGET)]
        token_id = one.proposal[place]
        draft = {token_id: 1.0}
        if one.draft_probs:
            draft = dict(zip(one.draft_probs[place].token_ids, one.draft_probs[place].probs, strict=True))
        coin = uniform(seed, position, 0, Stream.ACCEPT)
        if coin >= acceptance_probability(target[token_id], draft[token_id]):
            weights = residual_weights(target, [draft.get(id_, 0.0) for id_ in range(len(target))])
            return place, [*one.proposal[:place], _draw(weights, seed, position, Stream.RESIDUAL)]
    raise AssertionError("a round ends behind its last proposal")


def _draw(weights, seed, position, stream):
    """The Gumbel-max trick over weights that need not sum to 1."""
    sums = {
        id_: math.log(weight) + gumbel(seed, position, id_, stream) for id_, weight in enumerate(weights) if weight > 0
    }
    return max(sums, key=sums.get)
