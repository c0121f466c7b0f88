"""Laws of lookups beside a model: whichever has brought more tokens in the time proposes, and what fails costs nothing.

A simulated target says a given text; rounds take simulated seconds.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field, replace

import pytest

from specpair.combining import Combined, LookupDraft
from specpair.corpus import Corpus
from specpair.lookup import Lookup
from specpair.loop import Ask
from specpair.messages import Proposal
from specpair.pacing import GoodputPacer, Round
from specpair.prediction import PredictedOutput
from specpair.results import Source
from specpair.yields import Yields

PROMPT = [1000, 1001]
WIDTH = 7
STEP = 0.010


@dataclass
class Model:
    """A model that is right with a probability, and takes `cost` seconds for each id; it paces itself."""

    text: list[int]
    rate: float
    cost: float
    pacer: GoodputPacer = field(default_factory=GoodputPacer)
    name: str = "model"
    observed: list[Round] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    async def propose(self, ask: Ask) -> Proposal:
        at = len(ask.token_ids)
        truth = self.text[at : at + self.pacer.draft_length(ask.max_tokens)]
        ids = tuple(token if self.rng.random() < self.rate else -token for token in truth)
        return Proposal(ask.round, at, ids, Source.MODEL, asked=len(ids))

    def observe(self, round: Round) -> None:
        self.observed.append(round)
        self.pacer.observe(round)


@dataclass
class Run:
    """What a run has come to."""

    seconds: float
    rounds: list[Round]

    def share(self, source: Source, rounds: slice = slice(None)) -> float:
        """Of the rounds."""
        some = self.rounds[rounds]
        return sum(round.source is source for round in some) / len(some)

    @property
    def proposed(self) -> int:
        return sum(round.proposed for round in self.rounds)


def run(proposer, text, *, draft_seconds=lambda count: 0.0, step=lambda count: STEP):
    """The proposer against a target that says `text` behind `PROMPT`, which it begins with."""

    async def rounds():
        done, seconds, committed = [], 0.0, len(PROMPT)
        while committed < len(text):
            ask = Ask(len(done) + 1, text[:committed], min(WIDTH, len(text) - committed - 1), committed)
            proposal = await proposer.propose(ask)
            ids = proposal.token_ids
            assert len(ids) <= ask.max_tokens
            accepted = 0
            while accepted < len(ids) and ids[accepted] == text[committed + accepted]:
                accepted += 1
            source = proposal.source if ids else Source.TARGET
            took = draft_seconds(proposal.asked) if proposal.source is Source.MODEL else 0.0
            done.append(Round(ask.round, source, proposal.asked, len(ids), accepted, took, step(len(ids))))
            proposer.observe(done[-1])
            seconds += done[-1].seconds
            committed += accepted + 1
        return Run(seconds, done)

    return asyncio.run(rounds())


def lookups(yields=None, *, corpus=None, expected=None, length=None):
    prediction = None if expected is None else PredictedOutput(expected, len(PROMPT))
    return LookupDraft(Lookup(corpus, prediction), yields or Yields(), length)


def combined(model, **options):
    yields = Yields()
    return Combined(model, lookups(yields, **options), yields)


def plain(text):
    """Seconds of plain decoding."""
    return STEP * (len(text) - len(PROMPT))


def strange(count, seed=1, vocabulary=10**6):
    """A text in which nothing comes again, or as good as nothing."""
    rng = random.Random(seed)
    return PROMPT + [rng.randrange(2000, 2000 + vocabulary) for _ in range(count)]


def repeating(count, seed=1):
    """A text of a few long phrases in any order."""
    rng = random.Random(seed)
    phrases = [[rng.randrange(2000, 10**6) for _ in range(24)] for _ in range(4)]
    text = list(PROMPT)
    while len(text) < count:
        text += rng.choice(phrases)
    return text


class TestAlone:
    """Prompt lookup without a model."""

    def test_nothing_to_find(self):
        """A text without repetition is decoded plainly: nothing is proposed."""
        text = strange(500)
        done = run(lookups(), text)
        assert done.proposed == 0
        assert done.seconds == pytest.approx(plain(text))

    @pytest.mark.parametrize("vocabulary", [3, 20, 200])
    def test_lookups_that_fail_are_given_up(self, vocabulary):
        """Where every lookup that finds something is wrong, hardly any is proposed any more."""
        rng, tokens, index, text = random.Random(1), range(2000, 2000 + vocabulary), Lookup(), list(PROMPT)
        while len(text) < 6000:
            wrong = {token for found in index.find(text, len(text), 1) for token in found.token_ids}
            text.append(rng.choice([token for token in tokens if token not in wrong]))
        late = run(lookups(), text).rounds[-1000:]
        assert not any(round.accepted for round in late)
        assert sum(round.proposed for round in late) < 0.2 * len(late)

    def test_a_repeating_text_fills_the_blocks(self):
        """Where matches come true, as much is proposed as a block holds."""
        text = repeating(2000)
        done = run(lookups(), text)
        assert done.seconds < 0.25 * plain(text)
        assert done.share(Source.NGRAM, slice(-100, None)) == 1.0

    def test_a_fixed_length_is_kept(self):
        """With a draft length of its own it proposes that much of everything it finds, come true or not."""
        done = run(lookups(length=3), repeating(600))
        assert {round.proposed for round in done.rounds[50:-3]} <= {0, 3}
        assert run(lookups(length=0), repeating(600)).proposed == 0

    def test_the_guess_is_one_id_more(self):
        """With blocks ahead the proposal has an id more than the block is meant to have."""
        text = [*PROMPT, *range(2000, 2030), *PROMPT, *range(2000, 2005)]
        for limit in (1, 3, 7):
            proposal = asyncio.run(lookups().propose(Ask(1, text, limit, len(text), ahead=2)))
            assert len(proposal.token_ids) == proposal.asked + 1 <= limit + 1
        assert asyncio.run(lookups().propose(Ask(1, text, 0, len(text)))).token_ids == ()


class TestGivenBeforehand:
    """Corpus and prediction."""

    def test_an_earlier_output_in_the_corpus(self):
        """A text that was said before comes in whole blocks, as prediction."""
        text = strange(400)
        done = run(lookups(corpus=Corpus([strange(300, 7), text[len(PROMPT) :], strange(300, 8)])), text)
        assert done.seconds < 0.2 * plain(text)
        assert done.share(Source.PREDICTION) > 0.9

    def test_the_own_text_goes_before_the_corpus(self):
        """The corpus is heard where its match is longer than that in the session's own text."""
        log = [1, 2, 3, 9, 1, 2]
        assert sources(log, [1, 2, 4]) == [((3, 9, 1), Source.NGRAM)]
        assert sources(log, [9, 1, 2, 4]) == [((3, 9, 1), Source.NGRAM), ((4,), Source.PREDICTION)]

    def test_rubbish_costs_nothing(self):
        """A corpus in which all is found and nothing comes true, and a wrong prediction, are soon left alone."""
        text = strange(2000, vocabulary=40)
        noise = [strange(3000, seed, 40)[2:] for seed in range(8)]
        done = run(lookups(corpus=Corpus(noise), expected=noise[0]), text, step=lambda n: STEP * (1 + 0.01 * n))
        assert done.seconds < 1.03 * plain(text)

    def test_a_right_prediction_needs_no_model(self):
        """The whole output in whole blocks from the first on; the model is not asked at all."""
        text = strange(400)
        model = Model(text, 0.8, 0.001)
        done = run(combined(model, expected=text[len(PROMPT) :]), text)
        assert len(done.rounds) == -(-400 // (WIDTH + 1))
        assert done.share(Source.PREDICTION) == 1.0
        assert model.observed == []


def sources(log, text):
    """What lookups find in a log and in a corpus of one text."""
    return [(found.token_ids, found.source) for found in Lookup(Corpus([text])).find(log, len(log), 3)]


class TestBesideAModel:
    """The better source proposes."""

    @pytest.mark.parametrize(
        ("rate", "cost"),
        [(0.9, 0.0005), (0.7, 0.002), (0.3, 0.004), (0.0, 0.003)],
        ids=["good", "fair", "poor", "useless"],
    )
    @pytest.mark.parametrize("text", [strange(1500), repeating(1500), strange(1500, vocabulary=30)])
    def test_never_slower_than_the_better_one(self, text, rate, cost):
        """On any text and with any model the combination takes hardly longer than the faster of its two parts."""
        seconds = lambda count: cost * count  # noqa: E731
        model = run(Model(text, rate, cost), text, draft_seconds=seconds).seconds
        alone = run(lookups(), text).seconds
        both = run(combined(Model(text, rate, cost)), text, draft_seconds=seconds).seconds
        assert both < 1.06 * min(model, alone)

    def test_nothing_to_find_is_the_model(self):
        """Without a match it is always the model that proposes."""
        text = strange(500)
        assert run(combined(Model(text, 0.7, 0.002)), text).share(Source.NGRAM) == 0.0

    def test_failing_lookups_are_probed_now_and_then(self):
        """Where lookups never come true the model proposes, but for a few rounds that see whether it is still so."""
        text = [*PROMPT, *(token for i in range(2000) for token in (2000, 3000 + i))]
        done = run(combined(Model(text, 0.7, 0.002)), text, draft_seconds=lambda count: 0.002 * count)
        late = slice(len(done.rounds) // 2, None)
        assert 0.0 < done.share(Source.NGRAM, late) < 0.05

    def test_a_change_of_the_text_is_noticed(self):
        """Lookups that have failed for long are used again when the text begins to repeat itself."""
        head = [*PROMPT, *(token for i in range(1000) for token in (2000, 3000 + i))]
        text = head + repeating(3000)[len(PROMPT) :]
        done = run(combined(Model(text, 0.5, 0.003)), text, draft_seconds=lambda count: 0.003 * count)
        assert done.share(Source.NGRAM, slice(-100, None)) > 0.8

    def test_each_learns_from_its_own_rounds(self):
        """The model hears of the rounds that it proposed for, and of those without a proposal."""
        text = repeating(800)
        model = Model(text, 0.7, 0.002)
        done = run(combined(model), text, draft_seconds=lambda count: 0.002 * count)
        assert [round for round in done.rounds if round.source is not Source.NGRAM] == model.observed

    @pytest.mark.parametrize("length", [None, 3])
    def test_what_cannot_be_sent_is_not_proposed_for_ever(self, length):
        """Ids that no block may have count as wrong: the model proposes instead."""
        text = strange(600, vocabulary=30)
        draft = combined(Model(text, 0.8, 0.001), corpus=Corpus([[*PROMPT, *text[2:], 5]]), length=length)
        propose = draft.propose

        async def cut(ask):
            proposal = await propose(ask)
            return proposal if proposal.source is Source.MODEL else replace(proposal, token_ids=())

        draft.propose = cut
        done = run(draft, text)
        assert done.share(Source.MODEL, slice(-100, None)) > 0.8


@pytest.mark.parametrize("length", [None, 3])
def test_a_look_that_finds_nothing_leaves_the_target_to_itself(length):
    """Many plain steps may follow; they end as soon as a token makes a proposal worth while, and not before."""
    text = [*PROMPT, *strange(40)]
    looking = lookups(length=length)

    def look(log):
        return asyncio.run(looking.propose(Ask(1, log, WIDTH, len(log))))

    found = look(text)
    assert (found.token_ids, found.plain > 8) == ((), True)
    for behind in range(2, 8):  # said before: the match grows with every token
        again = [*text, *text[2:behind]]
        if looking.tempted(again, WIDTH):
            break
    assert behind > 2
    proposal = look(again)
    assert proposal.token_ids[:1] == (text[behind],)
    assert not looking.tempted(again, 0)


def test_temptation_counts_as_a_look():
    """A kind of match that has not paid so far is tried again after many looks, also if all of them were in passing."""
    text = [7, 8, 7]
    yields = Yields()
    looking = lookups(yields)
    kind = ("own", 1)
    for number in range(400):
        yields.looked_up(kind, Round(number, Source.NGRAM, 1, 1, 0, 0.0, STEP))
    looks = 1
    while not looking.tempted(text, WIDTH):
        looks += 1
        assert looks < 1000
    assert looks > 10
    assert asyncio.run(looking.propose(Ask(99, text, WIDTH, len(text)))).token_ids
    assert not looking.tempted(text, WIDTH)


def test_beside_a_model_lookups_alone_are_tempted():
    """Whether a model would propose is its own pacing's matter."""
    text = [*PROMPT, *strange(20)]
    both = combined(Model(text, 1.0, 0.001))
    asyncio.run(both.propose(Ask(1, text[:10], WIDTH, 10)))
    assert not both.tempted(text, WIDTH)
    assert both.tempted([*text, *text], WIDTH)


def test_repeatable_lookups_look_at_fixed_places():
    """Nothing ends their plain steps, of which there are few: how many have come by then is a matter of time."""
    text = [*PROMPT, *strange(20)]
    looking = LookupDraft(Lookup(), Yields(), repeatable=True)
    assert 0 < asyncio.run(looking.propose(Ask(1, text, WIDTH, len(text)))).plain <= 8
    assert not looking.tempted([*text, *text], WIDTH)
    assert asyncio.run(looking.propose(Ask(2, [*text, *text], WIDTH, 2 * len(text)))).token_ids == tuple(text[:WIDTH])


def test_a_distant_target_makes_plain_steps_cheap():
    """They go ahead of verdicts, so the way counts for a lookup alone: it has to bring what they make meanwhile."""
    yields, kind = Yields(), ("own", 3)
    assert yields.plain == 1.0
    for number in range(40):
        yields.looked_up(kind, Round(number, Source.NGRAM, 3, 3, 1, 0.0, 10 * STEP))
        # The first step behind a lookup has the whole way before it.
        for seconds in (10 * STEP, STEP, STEP):
            yields.stepped(Round(number, Source.TARGET, 0, 0, 0, 0.0, seconds))
    assert yields.plain == pytest.approx(10.0)
    _, goodput = yields.best_length(kind, WIDTH)
    assert 1.0 < goodput < 8.0
    assert not yields.pays(kind, goodput, yields.plain)
    looks = 1
    while not yields.pays(kind, goodput, yields.plain):
        looks += 1
    assert looks > 100 * (10.0 - goodput), "trying it costs more than a hundredth of the time"
