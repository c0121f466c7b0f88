"""Blocks that are sent before the verdict on the last one: applied when they fit what was said, dropped when not."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import CancelledError

import pytest

from specpair_target.blocks import Block, Stale, Verification
from specpair_target.prompts import Prompt

from ..tiny import random_ids, tiny_tokenizer
from .driving import greedy, open_session, run, sampled, speak, together
from .fake_engine import FakeVerifier, fake_scheduler, fake_session

NEW = 24
PROMPT = random_ids(11, seed=3)
TOKENIZER = tiny_tokenizer()
TEXT_PROMPT = TOKENIZER("def stop(x):")["input_ids"]
END = [greedy(NEW), sampled(NEW, temperature=1.0, seed=7)]


@pytest.fixture
def scheduler():
    """A scheduler whose sessions say 0, 1, 2, ...; it has not started."""
    scheduler = fake_scheduler(FakeVerifier())
    yield scheduler
    scheduler.stop()


def statuses(answers):
    """The base length of what was applied, None for what was stale, in order."""
    outcomes = [answer.result(30) for answer in answers]
    return [outcome.base_length if isinstance(outcome, Verification) else None for outcome in outcomes]


def test_the_first_alternative_that_fits_is_applied(scheduler):
    """Of blocks for the same length behind different last tokens, the first whose token was said; no second one."""
    session = fake_session(0, 3, prefilled=True)
    blocks = [
        Block([3], 3, 2),
        Block([9], 5, 9),
        Block([5], 5, 4),
        Block([6], 5, 4),
        Block([], 6, 5),
        Block([], 7, 9),
        Block([], 7, 6),
    ]
    answers = [scheduler.submit(session, block) for block in blocks]
    scheduler.start()
    assert statuses(answers) == [3, None, 5, None, None, None, 7]
    assert session.tokens == list(range(8))
    assert [answer.result().length for answer in answers if isinstance(answer.result(), Stale)] == [5, 7, 7, 7]


def test_nothing_is_applied_behind_the_end(scheduler):
    """Blocks that wait when the turn ends are stale, also where they would have fitted; the next turn goes on."""
    session = fake_session(0, 3, prefilled=True, max_new_tokens=4)
    answers = [scheduler.submit(session, Block([n, n + 1], n)) for n in (3, 6, 7, 9)]
    answers += [scheduler.submit(session, Block())]
    scheduler.start()
    assert statuses(answers) == [3, 6, None, None, None]
    assert session.tokens == list(range(7))
    assert session.finish_reason
    session.begin_turn([*session.tokens, 7], greedy(), None)
    scheduler.prefill(session)
    assert statuses([scheduler.submit(session, Block([8], 8, 7))]) == [8]


def test_a_closed_session_applies_nothing(scheduler):
    """Its blocks are cancelled, chained or not, and its tokens stay as they were."""
    session, other = fake_session(0, 3, prefilled=True), fake_session(1, 3, prefilled=True)
    answers = [scheduler.submit(session, Block([], n)) for n in (3, 4, 5)]
    scheduler.close(session)
    behind = scheduler.submit(other, Block())
    scheduler.start()
    assert statuses([behind]) == [3]
    for answer in answers:
        with pytest.raises(CancelledError):
            answer.result(30)
    assert session.tokens == list(range(3))


def test_a_failure_is_the_answer_to_all_that_wait(scheduler, monkeypatch):
    """Blocks behind one that failed fail with it."""
    session = fake_session(0, 3, prefilled=True)
    monkeypatch.setattr(session, "commit", lambda *args: 1 / 0)
    answers = [scheduler.submit(session, Block()) for _ in range(3)]
    scheduler.start()
    assert [answer.exception(30).reason for answer in answers] == ["ENGINE_FAILED"] * 3


async def chained(engine, prompt, options, truth, chance):
    """A session whose blocks are all sent as early as possible, right and wrong ones mixed; what it said."""
    session = await open_session(engine, prompt, options)
    said = []
    try:
        while not session.finish_reason:
            length, pending = session.length, []
            whole = [*prompt, *truth]
            for _ in range(chance.randint(1, 6)):
                count = chance.randint(0, engine.width - 1)
                right = whole[length : length + count]
                wrong = [*right[:-1], right[-1] ^ 1] if right and chance.random() < 0.3 else right
                last = whole[length - 1] if length <= len(whole) else 0
                pending.append(engine.submit(session, Block(wrong, length, last)))
                if chance.random() < 0.3:
                    pending.append(engine.submit(session, Block(right, length + chance.randint(-2, 2), last ^ 1)))
                length += len(right) + 1
            for answer in await asyncio.gather(*pending):
                if isinstance(answer, Verification):
                    assert answer.base_length == len(prompt) + len(said)
                    said += answer.commit.token_ids
        return said
    finally:
        engine.close(session)


@pytest.mark.parametrize("options", END, ids=["greedy", "sampled"])
def test_chains_change_no_token(engine_of, options):
    """Whatever is chained to whatever, in whatever company, each session says what it says alone."""
    engine = engine_of("llama")
    truths = [run(speak(engine, [*PROMPT, n], options)).token_ids for n in range(8)]
    for seed in range(4):
        outputs = together(
            *(
                chained(engine, [*PROMPT, n], options, truth, random.Random(f"{seed} {n}"))
                for n, truth in enumerate(truths)
            )
        )
        assert outputs == truths


def test_a_stop_string_ends_a_chain(engine_of):
    """The block that completes a stop string is the last one that is applied, however many right ones wait."""
    engine = engine_of("llama-text")
    plain = run(speak(engine, TEXT_PROMPT, greedy(NEW)))
    stop = plain.text[len(plain.text) // 2 :][:3]
    ended = run(speak(engine, TEXT_PROMPT, greedy(NEW, stop_strings=(stop,))))
    assert ended.stop_string == stop
    assert len(ended.token_ids) < NEW

    async def chain():
        options = greedy(NEW, stop_strings=(stop,))
        session = await engine.open(Prompt(TEXT_PROMPT), (), options, committed_field="")
        try:
            whole, start = [*TEXT_PROMPT, *plain.token_ids], len(TEXT_PROMPT)
            blocks = [Block([], length, whole[length - 1]) for length in range(start, len(whole))]
            answers = await asyncio.gather(*(engine.submit(session, block) for block in blocks))
            return list(session.tokens[start:]), answers
        finally:
            engine.close(session)

    said, answers = run(chain())
    assert said == ended.token_ids
    assert [isinstance(answer, Verification) for answer in answers] == [n < len(said) for n in range(NEW)]
