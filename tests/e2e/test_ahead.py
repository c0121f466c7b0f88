"""Verify streams whose client does not wait for verdicts: chains, alternatives, turns, flow control, company."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

from specpair.v1 import common_pb2, target_pb2

from .processes import run
from .sessions import APPLIED, STALE, RawSession, ids_prompt, refused, target_stub
from .test_sessions import ON, SAMPLING, TOKENS, generate, sampled


async def send(session, *blocks):
    """Sends blocks without waiting for anything."""
    for block in blocks:
        await session.call.write(target_pb2.VerifyRequest(block=block))


def chain(session, truth, length, count, chance):
    """Blocks behind each other from `length` on, as many of their proposals right as chance has it."""
    for _ in range(count):
        told = truth[length : length + chance.randrange(8)]
        wrong = chance.randrange(len(told) * 4) if told else 1
        ids = [id_ ^ (place == wrong) for place, id_ in enumerate(told)]
        last = truth[length - 1] if length <= len(truth) else 0
        yield session.block(ids, base_length=length, last_token_id=last, round=length)
        length += len(told) + 1


@sampled
def test_chains_change_no_token(bf16, prompts, sampling):
    """Several sessions at once, each with chains of up to 12 blocks in flight: the tokens and texts of Generate, and
    one verdict for each block, in order."""

    async def one(stub, number):
        chance, prompt = random.Random(f"{number} {sampling.seed}"), prompts[number]
        ids, texts = await generate(stub, prompt, sampling=sampling, stop=ON)
        session = await RawSession.open(stub, prompt, sampling=sampling, stop=ON)
        while not session.finish_reason:
            blocks = list(chain(session, [*prompt, *ids], len(session.tokens), chance.randrange(1, 13), chance))
            await send(session, *blocks)
            applied = 0
            for block in blocks:
                verdict = await session.receive()
                assert verdict.round == block.round
                applied += verdict.status == APPLIED
            assert applied >= 1
        assert session.output == ids
        assert "".join(session.texts) == "".join(texts)
        await session.finish()

    async def check():
        async with target_stub(bf16.target.address) as stub:
            await asyncio.gather(*(one(stub, number) for number in range(8)))

    run(check())


def test_a_whole_turn_in_flight(bf16, prompts):
    """Every block of a turn sent at once, each between an alternative behind another last token and a second one behind
    the same: exactly the right ones are applied."""
    prompt = prompts[8]

    async def check():
        async with target_stub(bf16.target.address) as stub:
            ids, _ = await generate(stub, prompt, sampling=SAMPLING[0], stop=ON)
            session = await RawSession.open(stub, prompt, sampling=SAMPLING[0], stop=ON)
            truth, length, expected = [*prompt, *ids], len(prompt), []
            for _ in range(5):
                right = {"base_length": length, "last_token_id": truth[length - 1]}
                wrong = {**right, "last_token_id": truth[length - 1] ^ 1}
                ids_told = truth[length : length + 3]
                await send(session, session.block(ids_told, **wrong), session.block(ids_told, **right))
                await send(session, session.block([], **right))
                expected += [STALE, APPLIED, STALE]
                length += 4
            assert [(await session.receive()).status for _ in expected] == expected
            assert session.output == ids[:TOKENS]
            assert session.finish_reason == common_pb2.FINISH_REASON_MAX_NEW_TOKENS
            await session.finish()

    run(check())


def test_the_next_turn_behind_blocks_that_came_too_late(bf16, prompts):
    """Blocks in flight when the turn ends are stale, and `extend` may be in flight behind them; so may the next
    turn's blocks."""
    prompt, more = prompts[8], [17, 300, 42]
    sampling = common_pb2.SamplingParams(max_new_tokens=4)

    async def check():
        async with target_stub(bf16.target.address) as stub:
            first, _ = await generate(stub, prompt, sampling=sampling, stop=ON)
            session = await RawSession.open(stub, prompt, sampling=sampling, stop=ON)
            start = len(prompt)
            await send(
                session,
                session.block(first[:2]),
                session.block([], base_length=start + 3, last_token_id=first[2]),
                *(session.block([], base_length=start + length) for length in (4, 4, 5)),
            )
            extend = target_pb2.SessionExtend(prompt=ids_prompt(more), sampling=sampling, stop=ON)
            await session.call.write(target_pb2.VerifyRequest(extend=extend))
            after = [*prompt, *first, *more]
            await send(session, session.block([], base_length=len(after), last_token_id=more[-1]))
            statuses = [(await session.receive()).status for _ in range(5)]
            assert statuses == [APPLIED, APPLIED, STALE, STALE, STALE]
            assert session.output == first
            started = (await session.call.read()).started
            assert (started.length, list(started.prompt_token_ids)) == (len(after), after[started.cached_tokens :])
            session.tokens = after
            session.finish_reason = common_pb2.FINISH_REASON_UNSPECIFIED
            assert (await session.receive()).status == APPLIED
            await session.run()
            assert len(session.output) == 8

    run(check())


def test_what_is_wrong_with_a_block_is_said_in_its_place(bf16, prompts):
    """A block that cannot be judged ends the stream behind the verdicts on those before it."""

    async def check():
        async with target_stub(bf16.target.address) as stub:
            session = await RawSession.open(stub, prompts[8], stop=ON)
            await send(session, session.block([1, 2]), session.block([], base_length=0), session.block([1] * 64))
            assert [(await session.receive()).status for _ in range(2)] == [APPLIED, STALE]
            async with refused(grpc.StatusCode.INVALID_ARGUMENT, "block.token_ids"):
                await session.receive()

    run(check())


@pytest.mark.parametrize("end", ["cancel", "half-close"])
def test_many_blocks_in_flight_when_the_client_goes(bf16, prompts, end):
    """Hundreds of blocks in flight, more than the target reads ahead: a client that cancels frees the slot at once, one
    that half-closes gets every verdict."""

    async def check():
        async with target_stub(bf16.target.address) as stub:
            session = await RawSession.open(stub, prompts[8], stop=ON)
            await send(session, session.block([]))
            await send(session, *(session.block([], base_length=1, round=n) for n in range(2, 400)))
            last = session.block([], base_length=len(session.tokens) + 1, round=400)
            last.ClearField("last_token_id")
            await send(session, last)
            if end == "cancel":
                assert (await session.receive()).status == APPLIED
                session.call.cancel()
                return
            verdicts = [await session.receive() for _ in range(400)]
            assert [verdict.round for verdict in verdicts] == list(range(1, 401))
            assert [verdict.status for verdict in verdicts] == [APPLIED, *[STALE] * 398, APPLIED]
            await session.finish()

    run(check())
    bf16.target.wait_until_free()
