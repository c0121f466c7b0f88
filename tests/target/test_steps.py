"""Several plain steps in one message: what they say, how they are numbered, and what ends them."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from specpair.v1 import common_pb2, target_pb2

from ..tiny import random_ids
from . import served
from .served import block, conversation, generated, opened, prompt, start

PROMPT = random_ids(20)
APPLIED, STALE = target_pb2.Verdict.STATUS_APPLIED, target_pb2.Verdict.STATUS_STALE


@pytest.fixture(scope="module")
def servicer(tiny):
    """Two slots, no tokenizer."""
    one = served.load(tiny, "llama")
    yield one
    one.stop()


async def verdicts(call, count):
    return [(await call.read()).verdict for _ in range(count)]


def said(found):
    return [token_id for verdict in found for token_id in verdict.committed.token_ids]


@pytest.mark.parametrize("counts", [[8, 8, 4], [1, 7, 2, 8, 2], [8, 1, 1, 8, 2]])
def test_steps_in_one_message_are_steps(servicer, counts):
    """However they are divided, the tokens are those of the target's own loop; each step has its verdict and round."""

    async def talk(stub):
        call, at, round_ = await opened(stub, PROMPT), len(PROMPT), 10
        for count in counts:
            await call.write(block(at, round_=round_, more_steps=count - 1))
            at, round_ = at + count, round_ + count
        found = await verdicts(call, sum(counts))
        await call.done_writing()
        assert [verdict.round for verdict in found] == list(range(10, 10 + sum(counts)))
        assert [verdict.base_length for verdict in found] == list(range(len(PROMPT), len(PROMPT) + sum(counts)))
        assert {verdict.status for verdict in found} == {APPLIED}
        assert said(found) == await generated(stub, PROMPT, sum(counts))

    conversation(servicer, talk)


def test_steps_behind_the_end_are_stale(servicer):
    """A turn that ends among them leaves the others stale, and the session to its next turn."""

    async def talk(stub):
        truth = await generated(stub, PROMPT, 8)
        call = stub.Verify()
        await call.write(start(PROMPT, sampling=common_pb2.SamplingParams(max_new_tokens=3)))
        assert (await call.read()).started.length == len(PROMPT)
        await call.write(block(len(PROMPT), more_steps=5))
        found = await verdicts(call, 6)
        assert [verdict.status for verdict in found] == [APPLIED] * 3 + [STALE] * 3
        assert said(found) == truth[:3]
        more = random_ids(4, seed=9)
        await call.write(target_pb2.VerifyRequest(extend=target_pb2.SessionExtend(prompt=prompt(more))))
        length = (await call.read()).started.length
        assert length == len(PROMPT) + 3 + len(more)
        await call.write(block(length, round_=7, more_steps=1))
        found = await verdicts(call, 2)
        await call.done_writing()
        assert [(verdict.status, verdict.round) for verdict in found] == [(APPLIED, 7), (APPLIED, 8)]
        assert said(found) == await generated(stub, [*PROMPT, *truth[:3], *more], 2)

    conversation(servicer, talk)


def test_steps_of_a_stream_that_is_given_up(servicer):
    """Those that were not taken yet are forgotten with it: the slot is free, and the next session undisturbed."""

    async def talk(stub):
        truth = await generated(stub, PROMPT, 8)
        for _ in range(5):
            call = await opened(stub, PROMPT, block(len(PROMPT), more_steps=7), block(len(PROMPT) + 8, more_steps=7))
            await call.read()
            call.cancel()
        assert await asyncio.gather(*(generated(stub, PROMPT, 8) for _ in range(2))) == [truth, truth]

    conversation(servicer, talk)


def test_steps_behind_proposals_are_refused(servicer):
    """At a length that nobody knows yet no step can be meant."""

    async def talk(stub):
        call = await opened(stub, PROMPT, block(len(PROMPT), [5], more_steps=1))
        with pytest.raises(grpc.RpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "block.more_steps" in refused.value.details()

    conversation(servicer, talk)
