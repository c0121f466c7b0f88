"""Health while the engine computes: whoever asks does not wait for a forward pass."""

from __future__ import annotations

import asyncio
import statistics
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specpair import SamplingParams, SpeculativeClient

from .processes import run

CHECKS = 50


def test_checks_are_answered_between_forwards(bf16, prompts):
    """Fifty checks at a target whose slots are all in use, and which goes on generating all the time: half of
    them take less than two rounds of a session. What they take in milliseconds bench/health_latency.py measures."""
    params = SamplingParams(max_new_tokens=200, ignore_eos=True)

    async def load(client, going, rounds):
        while going.is_set():
            async with client.stream(prompts[7], params) as stream:
                last = None
                async for _ in stream:
                    now = time.perf_counter()
                    rounds += [] if last is None else [now - last]
                    last = now
                    if not going.is_set():
                        break

    async def measured():
        going, rounds, waits = asyncio.Event(), [], []
        going.set()
        async with (
            SpeculativeClient(*bf16("ngram")) as client,
            grpc.aio.insecure_channel(bf16.target.address) as channel,
        ):
            busy = [asyncio.create_task(load(client, going, rounds)) for _ in range(8)]
            health = health_pb2_grpc.HealthStub(channel)
            while bf16.target.info().slots_in_use < 8:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            rounds.clear()
            for _ in range(CHECKS):
                begin = time.perf_counter()
                answer = await health.Check(health_pb2.HealthCheckRequest())
                waits.append(time.perf_counter() - begin)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                await asyncio.sleep(0.01)
            going.clear()
            during = list(rounds)
            await asyncio.gather(*busy)
        return waits, during

    waits, during = run(measured())
    assert len(during) > CHECKS, "the engine had nothing to do"
    assert statistics.median(waits) < 2 * statistics.median(during)
