"""Laws of losing a draft service and getting it back: it costs speed, at most one round's time, and never a token."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specpair import SamplingParams, Source, SpeculativeClient, breaker, failover, recovery
from specpair.errors import DeadlineError, DraftMismatchError, InternalError, InvalidRequestError, UnavailableError
from specpair.messages import DraftStarted, Phase

from .. import virtual_time
from . import flaky
from .fakes import FINGERPRINT, VOCABULARY, FakeTarget, continuation, perfect
from .flaky import FlakyDraft

PROMPT = "abc"
# Seconds: of a round that hangs, and what may come on top of it before a test says that somebody waited twice.
DEADLINE = 0.1


def hurry(monkeypatch):
    """A service that is lost is looked after every few milliseconds, and tried again after few more."""
    monkeypatch.setattr(recovery, "_FIRST", 0.002)
    monkeypatch.setattr(recovery, "_LONGEST", 0.002)
    monkeypatch.setattr(recovery, "_HEALTH", 0.01)
    monkeypatch.setattr(breaker, "_FIRST_COOLDOWN", 0.002)
    monkeypatch.setattr(breaker, "_LONGEST_COOLDOWN", 0.01)
    monkeypatch.setattr(failover, "_FIRST_RETRY", 0.002)
    monkeypatch.setattr(failover, "_LONGEST_RETRY", 0.01)


@pytest.fixture
def quick(monkeypatch):
    """See `hurry`."""
    hurry(monkeypatch)


def client(draft, target=None, mode="draft:1", **options):
    options = {"draft_timeout": DEADLINE, "draft_length": 2, "chain": 0, "connect_timeout": 1.0, **options}
    target = target or FakeTarget(delay=0.001)
    return SpeculativeClient("target:1", mode, target_transport=target, draft_transport=draft, **options)


def params(count=60, seed=0):
    return SamplingParams(max_new_tokens=count, seed=seed)


def run(work, within=30):
    """Runs a coroutine to its end, and checks that it leaves no task."""

    async def bounded():
        async with asyncio.timeout(within):
            result = await work()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return virtual_time.run(bounded())


def changes(result):
    return [change.proposer for change in result.stats.proposer_changes]


def check(result, count=60, seed=0):
    """The tokens are the target's alone, whatever happened; the statistics hold together."""
    assert list(result.token_ids) == continuation([ord(c) % VOCABULARY for c in PROMPT], count, seed)
    stats, told = result.stats, changes(result)
    assert all(one != another for one, another in zip(["model", *told], told, strict=False))
    assert stats.proposer == (told[-1] if told else "model")
    assert (stats.draft_losses, stats.draft_returns) == (told.count("ngram"), told.count("model"))


async def generate_with(opened, accidents, count=60, seed=0):
    """A generation in which `accidents[n]` happens behind the n-th chunk."""
    async with opened.stream(PROMPT, params(count, seed)) as stream:
        chunks = 0
        async for _ in stream:
            chunks += 1
            if chunks in accidents:
                accidents[chunks]()
    return stream.result


async def until(condition):
    """Waits for something that is to happen by itself."""
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110 - what it waits for is not made for waiting
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("chain", [0, 2])
@pytest.mark.parametrize("behaviour", ["killed", "hung"])
def test_lost_at_every_round(behaviour, chain):
    """In whatever round it happens, the turn goes on with lookups from there, and the tokens are the same."""

    async def work():
        results = []
        for accident in range(1, 13):
            draft = FlakyDraft()
            happens = draft.kill if behaviour == "killed" else draft.hang
            async with client(draft, chain=chain, draft_timeout=0.02) as opened:
                results.append(await generate_with(opened, {accident: happens}))
            assert all(stream.cancelled and not stream.used for stream in draft.streams)
        return results

    for accident, result in enumerate(run(work), 1):
        check(result)
        assert changes(result) == ["ngram"]
        assert accident <= result.stats.proposer_changes[0].round <= accident + 2 + chain


@pytest.mark.parametrize("chain", [0, 2])
@pytest.mark.parametrize("behaviour", ["killed", "hung"])
def test_back_in_the_middle_of_a_turn(behaviour, chain, quick, caplog):
    """The next round after it is ready has it again, with all tokens so far as its start and the prompt marked off."""
    draft = FlakyDraft()

    async def work():
        target = FakeTarget(delay=0.002)
        async with client(draft, target, chain=chain, draft_timeout=0.02) as opened:
            happens = draft.kill if behaviour == "killed" else draft.hang
            return await generate_with(opened, {3: happens, 15: draft.wake}, count=200)

    with caplog.at_level(logging.INFO, "specpair"):
        result = run(work)
    check(result, 200)
    assert changes(result) == ["ngram", "model"]
    first, second = draft.streams[0], draft.streams[-1]
    assert first.cancelled
    assert not first.used
    assert second.finished
    [start] = second.starts
    assert start.token_ids == (*result.prompt_token_ids, *result.token_ids)[: len(start.token_ids)]
    assert start.prompt_length == len(result.prompt_token_ids) < len(start.token_ids)
    sources = [token.source for token in result.tokens]
    assert Source.MODEL in sources[-10:]
    assert [record.levelname for record in caplog.records if record.name == "specpair"] == ["WARNING", "INFO"]


class CutOff(FlakyDraft):
    """While it hangs, everything that it is asked is lost on the way, and never answered."""

    async def answering(self, within):
        if self.state == "hung":
            await asyncio.sleep(math.inf if within is None else within)
            raise DeadlineError("no answer")
        await super().answering(within)

    def wake(self):
        super().wake()
        for stream in self.streams:
            stream.answers.clear()


@pytest.mark.parametrize("away", [0.05, 0.3, 1.0, 1.8, 2.1, 2.4, 10.0, 100.0])
@pytest.mark.parametrize("behaviour", ["killed", "hung", "cut off"])
def test_back_within_two_seconds(behaviour, away, monkeypatch):
    """However long a service was away, no more than two seconds pass from when it is back until it is used again."""
    monkeypatch.setattr(flaky, "_TICK", 0.01)
    draft = CutOff() if behaviour == "cut off" else FlakyDraft()

    async def work():
        loop, back = asyncio.get_running_loop(), []

        def wake():
            draft.wake()
            back.append(loop.time())

        target = FakeTarget(delay=0.1, max_length=20_000)
        options = {"draft_timeout": 1.0, "lookup": False}
        async with client(draft, target, **options) as opened, opened.stream(PROMPT, params(10_000)) as stream:
            chunks = 0
            async for chunk in stream:
                chunks += 1
                if chunks == 3:
                    draft.kill() if behaviour == "killed" else draft.hang()
                    loop.call_later(away, wake)
                if back and Source.MODEL in {token.source for token in chunk.tokens}:
                    return loop.time() - back[0], stream.stats.draft_losses
        raise AssertionError("it was not used again")

    waited, losses = run(work, within=2 * away + 30)
    # A pause shorter than a round may is none.
    assert losses == (behaviour != "hung" or away >= 1.0)
    assert waited < 2.0


def test_nobody_waits_for_a_trial(quick):
    """A service that says it is healthy and then hangs costs the turn that tries it nothing."""

    async def work():
        draft = FlakyDraft()
        async with client(draft, FakeTarget(delay=0.002), draft_timeout=1.0) as opened:
            await generate_with(opened, {3: draft.kill})
            draft.behaviour = lambda stream, ask: None
            draft.wake()
            await until(lambda: opened._drafting.recovery.breaker.state is not breaker.State.OPEN)
            result = await opened.generate(PROMPT, params(100))
            return result, len(draft.streams)

    result, streams = run(work)
    check(result, 100)
    assert changes(result) == ["ngram"]
    assert streams >= 2, "it was tried"
    assert result.stats.proposing_seconds < 0.5, "it waited for the trial"


def test_a_hang_costs_one_deadline_for_all_sessions():
    """Sessions that wait for the same service when it is declared lost go on at once, and none waits again: neither
    those that began to wait later, nor later turns."""

    async def work():
        draft = FlakyDraft()
        async with client(draft, FakeTarget(delay=0.003), draft_timeout=1.0) as opened:
            await opened.generate(PROMPT, params())
            lost = asyncio.Event()
            calls = [asyncio.create_task(generate_with(opened, {3 + n: lost.set}, seed=n)) for n in range(6)]
            await lost.wait()
            draft.hang()
            results = await asyncio.gather(*calls)
            later = await opened.generate(PROMPT, params())
            return draft, results, later

    draft, results, later = run(work)
    for seed, result in enumerate(results):
        check(result, seed=seed)
        assert changes(result) == ["ngram"]
        assert result.stats.proposing_seconds < 1.9, "it waited twice"
    check(later)
    assert later.stats.proposing_seconds < 0.9, "it waited again"
    assert later.stats.proposer_changes[0].round == 1
    assert all(stream.cancelled for stream in draft.streams[1:])


def test_who_began_to_wait_later_does_not_wait_longer():
    """The first one's deadline is the deadline of all."""

    async def work():
        draft, target = FlakyDraft(), FakeTarget(delay=0.006)
        async with client(draft, target, draft_timeout=0.4) as opened:
            quick = asyncio.create_task(opened.generate(PROMPT, params(1000)))
            await until(lambda: draft.asks)
            target.delay = 0.25
            # Its block is with the target when the draft hangs, and its wait begins 0.2 s later.
            later = asyncio.get_running_loop().call_later
            slow = await generate_with(opened, {2: lambda: later(0.05, draft.hang)}, count=15)
            return await quick, slow

    first, second = run(work)
    check(first, 1000)
    check(second, 15)
    assert changes(first) == changes(second) == ["ngram"]
    assert first.stats.proposing_seconds >= 0.399
    assert second.stats.proposing_seconds < 0.35


def test_a_hang_at_the_start_costs_one_deadline_too():
    """Who begins a turn waits for the first proposal no longer than for another; who comes later does not wait."""

    async def work():
        draft = FlakyDraft(behaviour=lambda stream, ask: None)
        async with client(draft, draft_timeout=0.2) as opened:
            return [await opened.generate(PROMPT, params(40)) for _ in range(3)]

    first, *others = run(work)
    check(first, 40)
    assert "no proposal within 0.2 s" in first.stats.proposer_changes[0].reason
    assert 0.2 <= first.stats.proposing_seconds < 0.3
    for result in others:
        check(result, 40)
        assert result.stats.proposing_seconds < 0.1


def test_a_long_prefill_goes_on_beside_the_turn():
    """A first proposal that takes longer than a round may is no loss: lookups propose until it is there."""

    async def work():
        draft = FlakyDraft()
        async with client(draft, FakeTarget(delay=0.005), draft_timeout=0.05) as opened:
            await opened._drafting.recovery.pairing.check()
            draft.hang()
            asyncio.get_running_loop().call_later(0.12, draft.wake)
            return await opened.generate(PROMPT, params(200)), len(draft.streams)

    result, streams = run(work)
    check(result, 200)
    assert changes(result) == ["ngram", "model"]
    assert streams == 1


@pytest.mark.parametrize("kind", ["model", "auto"])
def test_another_draft_in_its_place_is_never_used(kind, quick, caplog):
    """A service that comes back with another vocabulary opens no session and is no error; the log says it once."""
    draft = FlakyDraft()

    async def work():
        async with client(draft, FakeTarget(delay=0.002), "draft:1" if kind == "model" else "auto:draft:1") as opened:

            def swap():
                draft.kill()
                draft.fingerprint = replace(FINGERPRINT, vocabulary_size=VOCABULARY + 1)
                draft.wake()

            first = await generate_with(opened, {3: swap}, count=150)
            second = await opened.generate(PROMPT, params())
            draft.fingerprint = FINGERPRINT
            await until(lambda: opened._drafting.recovery.breaker.state is not breaker.State.OPEN)
            return first, second, await opened.generate(PROMPT, params(150))

    with caplog.at_level(logging.INFO, "specpair"):
        first, second, third = run(work)
    check(first, 150)
    check(second)
    check(third, 150)
    assert changes(first) == changes(second) == ["ngram"]
    assert "draft.fingerprint.vocabulary_size" in second.stats.proposer_changes[0].reason
    assert changes(third) == ["ngram", "model"]
    assert len(draft.streams) == 2
    assert [record.levelname for record in caplog.records if record.name == "specpair"] == [
        "WARNING",
        "WARNING",
        "INFO",
    ]


def test_a_draft_that_never_fitted_is_an_error_until_it_does(quick):
    """A service that was away at first and then turns out to be another one is refused as at the first contact."""

    async def work():
        draft = FlakyDraft(state="down", fingerprint=replace(FINGERPRINT, vocabulary_size=VOCABULARY + 1))
        async with client(draft, FakeTarget(delay=0.001)) as opened:
            check(await opened.generate(PROMPT, params()))
            draft.wake()
            await opened.generate(PROMPT, params())
            await until(lambda: opened._drafting.recovery.pairing.mismatch is not None)
            with pytest.raises(DraftMismatchError):
                await opened.generate(PROMPT, params())
            draft.fingerprint = FINGERPRINT
            await until(lambda: opened._drafting.recovery.breaker.state is not breaker.State.OPEN)
            check(await opened.generate(PROMPT, params()))

    run(work)


def too_many(stream, ask):
    return replace(perfect(stream, ask), token_ids=tuple(continuation(stream.log, 1000)))


def out_of_vocabulary(stream, ask):
    return replace(perfect(stream, ask), token_ids=(VOCABULARY, 2**32 - 1))


def unsure(*confidence):
    def behaviour(stream, ask):
        return replace(perfect(stream, ask), confidence=confidence)

    return behaviour


def eternal(stream, ask):
    return replace(perfect(stream, ask), draft_us=2**64 - 1)


def nothing(stream, ask):
    return replace(perfect(stream, ask), token_ids=())


def falsified(**changes):
    def behaviour(stream, ask):
        answer = perfect(stream, ask)
        return replace(answer, **{name: getattr(answer, name) + by for name, by in changes.items()})

    return behaviour


GARBAGE = [
    too_many,
    out_of_vocabulary,
    eternal,
    nothing,
    unsure(-1.0, -1.0),
    unsure(math.nan, math.inf, -math.inf),
    unsure(*[0.5] * 100),
    falsified(base_length=1),
    falsified(base_length=-1),
    falsified(round=1),
    lambda stream, ask: DraftStarted(Source.MODEL, 0),
    lambda stream, ask: InternalError("broken"),
    lambda stream, ask: InvalidRequestError("broken", field="ask"),
    lambda stream, ask: UnavailableError("broken"),
]


@pytest.mark.parametrize("chain", [0, 3, None])
@pytest.mark.parametrize("draft_length", [3, None])
@pytest.mark.parametrize("behaviour", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage(behaviour, draft_length, chain, quick):
    """Whatever it says, from the beginning or from the third ask on: the same tokens, and no error."""

    def later(stream, ask):
        return (behaviour if ask.round > 2 else perfect)(stream, ask)

    async def work():
        for answers in (behaviour, later):
            async with client(FlakyDraft(answers), draft_length=draft_length, chain=chain) as opened:
                check(await opened.generate(PROMPT, params(100)), 100)

    run(work)


def test_a_service_that_talks_nonsense_is_tried_less_and_less():
    """It is healthy and fits the target, and is of no use: each trial keeps it away for longer."""
    draft = FlakyDraft(falsified(round=1))

    async def work():
        async with client(draft, FakeTarget(delay=0.005)) as opened:
            result = await opened.generate(PROMPT, params(400))
            return result, opened._drafting.recovery.breaker

    result, broken = run(work)
    check(result, 400)
    assert changes(result) == ["ngram"]
    assert broken.losses == 1
    trials = len(draft.streams) - 1
    assert trials <= 1 + math.log2(1 + result.stats.seconds / (0.5 * 0.75))


def test_a_full_service_is_left_to_those_that_have_a_slot(quick):
    """Who finds no slot goes on with lookups and tries again; who has one keeps it, and nobody is told of a loss."""

    async def work():
        draft = FlakyDraft(slots=1, retry_after=0.01)
        async with client(draft, FakeTarget(delay=0.002)) as opened:
            results = await asyncio.gather(
                opened.generate(PROMPT, params(60)),
                opened.generate(PROMPT, params(300, seed=1)),
            )
            return results, draft, opened._drafting.recovery.breaker

    (first, second), draft, unbroken = run(work)
    check(first)
    check(second, 300, seed=1)
    assert changes(first) == []
    assert changes(second) == ["ngram", "model"]
    assert "draft lost: no slot" in second.stats.proposer_changes[0].reason
    assert (unbroken.losses, unbroken.state) == (0, breaker.State.CLOSED)
    assert len(draft.streams) >= 3


def test_the_retry_hint_is_kept():
    """A session tries no earlier than the service has said."""

    async def work():
        draft = FlakyDraft(slots=0, retry_after=0.1)
        async with client(draft, FakeTarget(delay=0.004)) as opened:
            result = await opened.generate(PROMPT, params(200))
            return result, len(draft.streams)

    result, streams = run(work)
    check(result, 200)
    assert 2 <= streams <= 1 + result.stats.seconds / 0.1


@dataclass
class Noting(FlakyDraft):
    """Notes when sessions come."""

    came: list[float] = field(default_factory=list)

    async def propose(self, start, within=None):
        self.came.append(asyncio.get_running_loop().time())
        return await super().propose(start, within)


def waits_until(times, draft):
    """Seconds between a generation's sessions at a draft that is of no use, until there were so many."""

    async def work():
        target = FakeTarget(delay=0.05, max_length=20_000)
        async with client(draft, target, lookup=False) as opened, opened.stream(PROMPT, params(19_000)) as stream:
            async for _ in stream:
                if len(draft.came) >= times:
                    return [later - one for one, later in pairwise(draft.came)]
        raise AssertionError(f"no more than {len(draft.came)} sessions")

    return run(work, within=1000)


# Seconds by which something is noticed later than it happened: rounds without a look at the service.
LOOK = 0.5


def test_a_service_of_no_use_is_tried_after_the_documented_times():
    """At once after the first loss, but for the question for its health; then after half a second and a quarter more or
    less, doubled with every trial that fails, up to half a minute."""
    first, *waits = waits_until(10, Noting(falsified(round=1)))
    assert 0.2 <= first < 0.2 + LOOK
    for wait, expected in zip(waits, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0], strict=True):
        assert 0.75 * expected <= wait < 1.25 * expected + 0.5 + LOOK  # questions are half a second apart


def test_a_session_without_a_slot_tries_again_after_the_documented_times():
    """If the service does not say when: after a second, and so on, doubled every time, up to half a minute."""
    waits = waits_until(9, Noting(slots=0))
    for wait, expected in zip(waits, [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0], strict=True):
        assert expected <= wait < expected + LOOK


def test_one_sessions_failure_is_its_own_while_others_are_served(quick):
    """A service that never answers one session and goes on answering another one is not lost."""

    def behaviour(stream, ask):
        return None if stream.seed == 1 else perfect(stream, ask)

    async def work():
        draft = FlakyDraft(behaviour)
        async with client(draft, FakeTarget(delay=0.002), draft_timeout=0.02) as opened:
            results = await asyncio.gather(
                opened.generate(PROMPT, params(300)), opened.generate(PROMPT, params(100, seed=1))
            )
            return results, opened._drafting.recovery.breaker.losses

    (served, unserved), losses = run(work)
    check(served, 300)
    check(unserved, 100, seed=1)
    assert (changes(served), changes(unserved), losses) == ([], ["ngram"], 0)


def test_what_a_session_knew_of_the_draft_outlives_it(quick):
    """After the return it is asked for as many ids as before, not for those that a stranger would be asked for."""
    draft = FlakyDraft()

    async def work():
        async with client(draft, FakeTarget(delay=0.002), draft_length=None, lookup=False) as opened:
            return await generate_with(opened, {20: draft.kill, 30: draft.wake}, count=300)

    result = run(work)
    check(result, 300)
    assert changes(result) == ["ngram", "model"]
    before = [ask.max_tokens for ask in draft.asks if ask.max_tokens > 1]
    # The first asks of a stranger are for 4 ids; with everything accepted a block is soon as long as it may be.
    assert before[0] == 4
    second = draft.streams[-1].starts[0]
    known = [ask.max_tokens for ask in draft.asks if ask.from_position > len(second.token_ids)]
    assert known[0] >= 6


def test_closing_the_client_is_no_loss(caplog):
    """What is under way ends; nothing is looked after any more."""

    async def work():
        draft = FlakyDraft()
        async with client(draft) as opened:
            await generate_with(opened, {3: draft.kill})

    with caplog.at_level(logging.INFO, "specpair"):
        run(work)
    assert [record.levelname for record in caplog.records if record.name == "specpair"] == ["WARNING"]


STEPS = ["up", "hang", "kill", "nonsense", "full", "swap", "loading", "dies", "empty"]


@given(
    seed=st.integers(0, 99),
    chain=st.sampled_from([0, 2, None]),
    draft_length=st.sampled_from([None, 2, 7]),
    lookup=st.sampled_from([None, False]),
    sessions=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_whatever_happens_to_it(seed, chain, draft_length, lookup, sessions):
    """A service that changes at random while several sessions of two turns run: the same tokens, no error, no task and
    no session left."""
    rng = random.Random(seed)
    draft = FlakyDraft()

    def behaviour(stream, ask):
        match draft.mood:
            case "nonsense":
                return rng.choice(GARBAGE)(stream, ask)
            case "dies":
                draft.kill()
            case "empty":
                return nothing(stream, ask)
        return perfect(stream, ask)

    def change():
        draft.mood = mood = rng.choice(STEPS)
        draft.phase = Phase.LOADING if mood == "loading" else Phase.READY
        draft.slots = 0 if mood == "full" else None
        draft.retry_after = rng.choice([None, 0.001])
        draft.fingerprint = replace(FINGERPRINT, vocabulary_sha256="other") if mood == "swap" else FINGERPRINT
        if mood in ("kill", "swap"):
            draft.kill()
        draft.state = {"hang": "hung", "kill": "down"}.get(mood, "up")

    async def changing():
        while True:
            await asyncio.sleep(rng.random() * 0.02)
            change()

    async def turns(opened, number):
        async with opened.session() as session:
            for prompt in ("a", "bc"):
                result = await session.generate(prompt, params(60, seed=number))
                assert list(result.token_ids) == continuation(result.prompt_token_ids, 60, number)

    async def work():
        options = {"chain": chain, "draft_length": draft_length, "lookup": lookup, "draft_timeout": 0.005}
        async with client(draft, FakeTarget(delay=0.002), **options) as opened:
            weather = asyncio.create_task(changing())
            try:
                await asyncio.gather(*(turns(opened, number) for number in range(sessions)))
            finally:
                weather.cancel()
                await asyncio.gather(weather, return_exceptions=True)

    draft.mood, draft.behaviour = "up", behaviour
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        run(work)
    assert not any(stream.used for stream in draft.streams)
    assert all(stream.cancelled or stream.finished for stream in draft.streams)
