"""More clients than slots: everybody gets the tokens or a refusal that says when to come back, and nobody starves."""

from __future__ import annotations

import asyncio
import itertools

import grpc

from specpair import OverloadedError, SamplingParams, SpeculativeClient
from specpair.v1 import common_pb2, target_pb2, target_pb2_grpc

from .processes import run
from .sessions import ids_prompt, target_stub

CLIENTS = 100
SLOTS = 4
PARAMS = [SamplingParams(max_new_tokens=4), SamplingParams(max_new_tokens=4, temperature=0.9, seed=3)]
# Seconds within which each client is done that comes back when it is told to.
BOUND = 120.0
# A client that takes a few kilobytes that its caller has not read, and no more.
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]


def test_a_hundred_clients(fp32, prompts):
    """All at once on 4 slots: each finishes with the same tokens, at once or by coming back as it was told."""
    jobs = list(itertools.product(prompts[4:7], PARAMS))
    refusals = []

    async def persist(addresses, prompt, params):
        async with SpeculativeClient(*addresses) as client:
            while True:
                try:
                    return (await client.generate(prompt, params, timeout=BOUND)).token_ids
                except OverloadedError as refused:
                    refusals.append((refused.reason, refused.retry_after))
                    await asyncio.sleep(refused.retry_after or 0.0)

    async def check():
        async with SpeculativeClient(*fp32("none")) as client:
            expected = [(await client.generate(*job)).token_ids for job in jobs]
        async with asyncio.timeout(BOUND):
            kinds = ["model", "ngram", "none"]
            asked = [(fp32(kinds[n % len(kinds)]), *jobs[n // len(kinds) % len(jobs)]) for n in range(CLIENTS)]
            outputs = await asyncio.gather(*(persist(*one) for one in asked))
        assert outputs == [expected[n // len(kinds) % len(jobs)] for n in range(CLIENTS)]

    assert fp32.target.info().slots == SLOTS
    run(check())
    assert refusals, "the queue held them all: there was no overload"
    assert all(reason and after for reason, after in refusals), "a refusal without a reason, or a time to come back"


def test_slow_readers(bf16, prompts):
    """Streams that nobody reads stop when their windows are full; neighbours go on, and late readers miss nothing."""
    prompt = prompts[3]
    request = target_pb2.GenerateRequest(
        prompt=ids_prompt(prompt),
        stop=common_pb2.StopCriteria(ignore_eos=True),
        logprobs=common_pb2.LogprobsOptions(enabled=True, top_n=20),
    )
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)

    async def tokens(call):
        ids = []
        while (response := await call.read()) is not grpc.aio.EOF:
            ids += response.committed.token_ids
        return ids

    async def check():
        async with (
            target_stub(bf16.target.address) as quick,
            grpc.aio.insecure_channel(bf16.target.address, options=SMALL_WINDOW) as channel,
        ):
            stub = target_pb2_grpc.TargetServiceStub(channel)
            expected = await tokens(quick.Generate(request))
            slow = [stub.Generate(request) for _ in range(3)]
            for call in slow:
                await call.read()
            async with SpeculativeClient(*bf16("model")) as client:
                for _ in range(2):
                    result = await client.generate(prompt, params, timeout=BOUND)
                    assert list(result.token_ids) == expected[:60]
            assert bf16.target.info().slots_in_use == len(slow)
            for call in slow:
                assert await tokens(call) == expected

    run(check())
