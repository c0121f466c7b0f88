"""The rejection rule on tensors: the law of `law.py`, and the target's distribution whatever the draft."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from specpair_runtime.sampling.choice import sample
from specpair_runtime.sampling.law import acceptance_probability, residual_weights
from specpair_runtime.sampling.noise import Stream, gumbel_noise, uniform_noise
from specpair_runtime.sampling.params import SamplingBatch, SamplingParams
from specpair_runtime.sampling.processors import process
from specpair_runtime.sampling.rejection import MAX_SUPPORT, SparseProbs, judge_by_rejection

from ..rejecting import propose_by_rejection
from .chi_square import chi_square

CPU = torch.device("cpu")
# Least p value that a fixed seed must reach, and what a wrong distribution must fall below.
PASSES, FAILS = 1e-3, 1e-9


def batch_of(seeds, **params):
    """One session under the rejection rule for each seed."""
    params = {"temperature": 1.0, "rejection": True, **params}
    return SamplingBatch.of([SamplingParams(seed=int(seed), **params) for seed in seeds], CPU)


def sparse(probs):
    """A whole distribution as a draft sends it."""
    ids = [token_id for token_id, prob in enumerate(probs) if prob > 0]
    return SparseProbs(ids, [probs[token_id] for token_id in ids])


# --- the law -------------------------------------------------------------------------------------------------------


def distributions(vocabulary):
    """Distributions over a few ids, some of them impossible, as float32 holds them."""
    weights = st.lists(st.integers(0, 20), min_size=vocabulary, max_size=vocabulary).filter(any)
    return weights.map(lambda parts: (torch.tensor(parts, dtype=torch.float32) / sum(parts)).tolist())


@st.composite
def judged_blocks(draw):
    """Some sessions: per row a target distribution, per proposal the id and its draft distribution or None."""
    vocabulary, columns = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    sessions = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(0, columns))
        targets = [draw(distributions(vocabulary)) for _ in range(columns + 1)]
        if draw(st.booleans()):
            drafts = [draw(distributions(vocabulary)) for _ in range(count)]
            ids = [draw(st.sampled_from([id_ for id_, prob in enumerate(draft) if prob > 0])) for draft in drafts]
        else:
            drafts, ids = None, [draw(st.integers(0, vocabulary - 1)) for _ in range(count)]
        sessions.append((draw(st.integers(-(2**63), 2**63 - 1)), targets, drafts, ids))
    return draw(st.integers(0, 5000)), columns, sessions


@settings(max_examples=200, deadline=None, derandomize=True)
@given(judged_blocks())
def test_the_vectorised_rule_is_the_law(case):
    """A proposal is accepted iff its coin is below the law's probability; the replacement is the law's residual under
    its own noise; the token behind the last proposal is the target's own draw."""
    first, columns, sessions = case
    scores = torch.tensor([targets for _, targets, _, _ in sessions]).log()
    vocabulary = scores.shape[-1]
    proposed = torch.tensor([ids + [0] * (columns - len(ids)) for _, _, _, ids in sessions])
    counts = torch.tensor([len(ids) for _, _, _, ids in sessions])
    positions = (first + torch.arange(columns + 1)).expand(len(sessions), -1)
    params = batch_of([seed for seed, *_ in sessions])
    draft_probs = [[sparse(draft) for draft in drafts or ()] for _, _, drafts, _ in sessions]
    accepted, choices = judge_by_rejection(scores, proposed, counts, positions, params, draft_probs)
    own = sample(scores, positions, params)
    for row, (seed, _, drafts, ids) in enumerate(sessions):
        for column, token_id in enumerate(ids):
            target = scores[row, column].softmax(dim=-1).tolist()
            draft = drafts[column] if drafts else [float(id_ == token_id) for id_ in range(vocabulary)]
            place = torch.tensor(seed), torch.tensor(first + column)
            coin = float(uniform_noise(*place, 1, Stream.ACCEPT)[0])
            assert bool(accepted[row, column]) == (coin * draft[token_id] < target[token_id])
            chance = acceptance_probability(target[token_id], draft[token_id])
            if abs(coin - chance) > 1e-6:
                assert bool(accepted[row, column]) == (coin < chance)
            weights = residual_weights(target, draft)
            if sum(weights) > 1e-6:
                noise = gumbel_noise(*place, vocabulary, Stream.RESIDUAL).tolist()
                sums = [math.log(weight) + g if weight else -math.inf for weight, g in zip(weights, noise, strict=True)]
                assert weights[choices[row, column]] > 0
                assert sums[choices[row, column]] == pytest.approx(max(sums), abs=1e-5)
        assert choices[row, len(ids) :].tolist() == own[row, len(ids) :].tolist()


def test_an_impossible_proposal_is_never_accepted():
    """Nothing that the target's processors removed is accepted, however sure the draft is of it."""
    seeds = range(2000)
    scores = torch.tensor([0.0, 0.0, -math.inf]).expand(2000, 2, 3)
    proposed, counts = torch.full((2000, 1), 2), torch.ones(2000, dtype=torch.int64)
    positions = torch.arange(2).expand(2000, 2)
    for sent in ([], [SparseProbs([2], [1.0])]):
        accepted, choices = judge_by_rejection(scores, proposed, counts, positions, batch_of(seeds), [sent] * 2000)
        assert not accepted.any()
        assert set(choices.flatten().tolist()) == {0, 1}


# --- what is emitted ------------------------------------------------------------------------------------------------

SESSIONS, COLUMNS, VOCABULARY = 1000, 4, 14
TRUNCATIONS = {
    "cold": {"temperature": 0.4},
    "plain": {},
    "hot": {"temperature": 1.8},
    "top-k": {"temperature": 1.2, "top_k": 5},
    "top-p": {"temperature": 0.9, "top_p": 0.8},
    "min-p": {"temperature": 1.3, "min_p": 0.15},
    "all": {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
}


def target_logits():
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) * 1.5


def draft_distribution(kind, target, params):
    """What a kind of draft samples from, [vocabulary], given the target's logits; certain ones know one id."""
    other = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2))
    if kind == "sure of the best":
        return torch.eye(VOCABULARY)[target.argmax()]
    if kind == "sure of the worst":
        return torch.eye(VOCABULARY)[target.argmin()]
    logits = {"equal": target, "good": target + 0.4 * other, "bad": other, "opposite": -target}[kind]
    return process(logits[None, None], params)[0, 0].softmax(dim=-1)


def judged(params, target, draft, certain=False, stream=Stream.DRAFT):
    """Which of many independent proposals are accepted, and what is emitted in their places, [SESSIONS, COLUMNS]."""
    positions = torch.arange(40, 40 + COLUMNS + 1).expand(SESSIONS, -1)
    drawn = draft.log().expand(SESSIONS, COLUMNS, -1)
    proposed = sample(drawn, positions[:, :-1], params, stream)
    scores = process(target.expand(SESSIONS, COLUMNS + 1, -1), params)
    counts = torch.full((SESSIONS,), COLUMNS)
    sent = [[] if certain else [sparse(draft.tolist())] * COLUMNS] * SESSIONS
    accepted, choices = judge_by_rejection(scores, proposed, counts, positions, params, sent)
    return accepted, torch.where(accepted, proposed, choices[:, :-1])


@pytest.mark.parametrize("kind", ["equal", "good", "bad", "opposite", "sure of the best", "sure of the worst"])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_the_emitted_token_has_the_targets_distribution(truncation, kind):
    """Whatever the draft, what is emitted in the place of a proposal is a draw from the target's processed
    distribution, and as many are accepted as the two distributions have in common."""
    params = batch_of(range(SESSIONS), **TRUNCATIONS[truncation])
    target = target_logits()
    wanted = process(target[None, None], params)[0, 0].softmax(dim=-1)
    draft = draft_distribution(kind, target, params)
    accepted, emitted = judged(params, target, draft, certain=kind.startswith("sure"))
    assert chi_square(emitted.flatten().tolist(), wanted.tolist()) > PASSES
    overlap = float(torch.minimum(wanted, draft).sum())
    if kind == "equal":
        assert accepted.all()
    else:
        count = int(accepted.sum())
        assert stats.binomtest(count, accepted.numel(), min(overlap, 1.0)).pvalue > PASSES


@pytest.mark.parametrize(("kind", "stream"), [("good", Stream.ACCEPT), ("bad", Stream.RESIDUAL)])
def test_noise_shared_with_the_draft_would_be_found(kind, stream):
    """The same test fails by far when the draft samples with the noise of the coin or of the residual: the rule
    needs independent noise, and this measure sees when it is not."""
    params = batch_of(range(SESSIONS))
    target = target_logits()
    wanted = target.softmax(dim=-1).tolist()
    draft = draft_distribution(kind, target, params)
    _, emitted = judged(params, target, draft)
    assert chi_square(emitted.flatten().tolist(), wanted) > PASSES
    _, biased = judged(params, target, draft, stream=stream)
    assert chi_square(biased.flatten().tolist(), wanted) < FAILS


def test_q_that_was_not_sampled_from_would_be_found():
    """The same test fails by far when a draft truncates before it samples and sends what it had before."""
    params = batch_of(range(SESSIONS))
    target = target_logits()
    whole = draft_distribution("good", target, params)
    cut = torch.where(whole >= whole.topk(4).values[-1], whole, 0.0)
    positions = torch.arange(40, 40 + COLUMNS + 1).expand(SESSIONS, -1)
    proposed = sample(cut.log().expand(SESSIONS, COLUMNS, -1), positions[:, :-1], params, Stream.DRAFT)
    scores = target.expand(SESSIONS, COLUMNS + 1, -1)
    counts = torch.full((SESSIONS,), COLUMNS)
    for sent, passes in ((cut / cut.sum(), True), (whole, False)):
        draft_probs = [[sparse(sent.tolist())] * COLUMNS] * SESSIONS
        accepted, choices = judge_by_rejection(scores, proposed, counts, positions, params, draft_probs)
        emitted = torch.where(accepted, proposed, choices[:, :-1]).flatten().tolist()
        likelihood = chi_square(emitted, target.softmax(dim=-1).tolist())
        assert likelihood > PASSES if passes else likelihood < FAILS


# --- the draft's side -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "options"),
    [(300, {}), (300, {"temperature": 0.5, "top_p": 0.7}), (300, {"top_k": 5}), (40, {"temperature": 2.0}), (1, {})],
)
def test_a_draft_sends_what_it_samples_from(vocabulary, options):
    """Over many positions and seeds the sampled ids have the very frequencies that were sent, over at most
    MAX_SUPPORT ids whose probabilities sum to 1."""
    draws = 1200
    logits = torch.randn((1, 1, vocabulary), generator=torch.Generator().manual_seed(3)) * 2
    sampled = []
    for draw in range(draws):
        params = batch_of([draw % 40], **options)
        token, sent = propose_by_rejection(process(logits, params), torch.tensor([[draw // 40]]), params)
        assert token in sent.token_ids
        sampled.append(token)
    assert len(sent.token_ids) == len(set(sent.token_ids)) == len(sent.probs) <= MAX_SUPPORT
    assert sum(sent.probs) == pytest.approx(1.0, abs=1e-6)
    assert min(sent.probs) > 0
    if vocabulary > MAX_SUPPORT and not options:
        assert len(sent.token_ids) == MAX_SUPPORT
    probs = dict(zip(sent.token_ids, sent.probs, strict=True))
    # What is sent is the processed distribution, cut to its best ids and normalised.
    kept = process(logits, params)[0, 0, list(probs)]
    torch.testing.assert_close(torch.tensor(sent.probs), kept.softmax(dim=-1), rtol=1e-6, atol=1e-7)
    assert chi_square(sampled, [probs.get(token_id, 0.0) for token_id in range(vocabulary)]) > PASSES


def test_a_drafts_sample_is_drawn_with_the_drafts_own_noise():
    """The sample is the draft stream's draw at its seed and position, and not the target's."""
    logits = torch.randn((1, 1, 50), generator=torch.Generator().manual_seed(4))
    own, targets = 0, 0
    for draw in range(200):
        params = batch_of([draw])
        position = torch.tensor([[draw]])
        token, _ = propose_by_rejection(process(logits, params), position, params)
        own += token == int(sample(logits, position, params, Stream.DRAFT))
        targets += token == int(sample(logits, position, params, Stream.TARGET))
    assert own == 200
    assert targets < 30


# --- the noise ------------------------------------------------------------------------------------------------------


def independent(first, second):
    """Whether two sets of uniform numbers look independent: no correlation, and evenly spread over a 16 by 16 grid."""
    correlation = float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])
    cells = (first * 16).long() * 16 + (second * 16).long()
    counts = torch.bincount(cells.flatten(), minlength=256)
    return abs(correlation) < 4 / math.sqrt(first.numel()) and stats.chisquare(counts.numpy()).pvalue > PASSES


def test_the_streams_are_independent():
    """Under one seed, at the same places, no stream says anything about another."""
    seeds, positions = torch.arange(8)[:, None].expand(8, 32), torch.arange(32).expand(8, 32)
    noise = {stream: uniform_noise(seeds, positions, 512, stream) for stream in Stream}
    for first, second in combinations(Stream, 2):
        assert independent(noise[first], noise[second]), (first, second)
    # The measure sees noise that is shared.
    assert not independent(noise[Stream.DRAFT], noise[Stream.DRAFT])
    assert not independent(noise[Stream.DRAFT], 1 - noise[Stream.DRAFT])


def test_neighbouring_places_are_independent():
    """Noise at the next position, id or seed says nothing about the noise here, not even of another stream."""
    seeds, positions = torch.arange(9)[:, None].expand(9, 33), torch.arange(33).expand(9, 33)
    noise = {stream: uniform_noise(seeds, positions, 513, stream) for stream in (Stream.DRAFT, Stream.RESIDUAL)}
    here = noise[Stream.DRAFT][:-1, :-1, :-1]
    for there in noise.values():
        assert independent(here, there[:-1, :-1, 1:])
        assert independent(here, there[:-1, 1:, :-1])
        assert independent(here, there[1:, :-1, :-1])
