"""A session is its stream: when the client goes, by whatever way, its slots are free at once."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import textwrap
import time

import pytest

from specpair import DeadlineError, OverloadedError, Result, SamplingParams, SpeculativeClient, SyncSpeculativeClient
from specpair.v1 import target_pb2

from ..amounts import runs
from .processes import environment, run
from .sessions import RawSession, ids_prompt, target_stub

ENDLESS = SamplingParams(ignore_eos=True)
PARAMS = SamplingParams(max_new_tokens=12)
# Seconds within which the slots of a client that has gone are free. A busy machine may take longer now and then.
FREE = 1.0
# Client processes at a time; the target has a slot for each.
PROCESSES = 6

# Streams without end and says how far it is, until it is killed.
CLIENT = textwrap.dedent("""
    import asyncio, sys
    from specpair import SamplingParams, SpeculativeClient

    async def main(target, draft, *ids):
        async with SpeculativeClient(target, draft, draft_length=2) as client:
            async with client.stream([int(id_) for id_ in ids], SamplingParams(ignore_eos=True)) as stream:
                async for _ in stream:
                    print(len(stream.tokens), flush=True)

    asyncio.run(main(*sys.argv[1:]))
""")


class Watched:
    """A pair of services, and how long they took to have all of their slots free, in seconds."""

    def __init__(self, pair):
        self._pair = pair
        self.target, self.draft = pair.target, pair.draft
        self.waits = []

    def __call__(self, kind):
        return self._pair(kind)

    def wait_until_free(self):
        """Waits for both."""
        begun = time.monotonic()
        for service in (self.target, self.draft):
            service.wait_until_free()
        self.waits.append(time.monotonic() - begun)


@pytest.fixture
def checked(bf16, prompts):
    """The bf16 pair: free in time, and the same request gets the same tokens before and after the test."""
    watched = Watched(bf16)
    with SyncSpeculativeClient(*bf16("model")) as client:
        before = client.generate(prompts[7], PARAMS).token_ids
        yield watched
        watched.wait_until_free()
        assert client.generate(prompts[7], PARAMS).token_ids == before
    late = [wait for wait in watched.waits if wait >= FREE]
    assert len(late) <= 1 + len(watched.waits) // 20, watched.waits


def test_streams_closed_early(checked, prompts):
    """Streams closed after some chunks or before the first one: free within a second each time."""
    chance = random.Random(1)

    async def check():
        async with SpeculativeClient(*checked("model")) as client:
            for n in range(runs(12)):
                async with client.stream(chance.choice(prompts), ENDLESS) as stream:
                    for _ in range(n % 7):
                        await anext(stream)
                    if n % 7:
                        assert checked.target.info().slots_in_use == 1
                await asyncio.to_thread(checked.wait_until_free)

    run(check())


def test_tasks_cancelled(checked, prompts):
    """Tasks cancelled after a random time, 4 at once: free within a second each time."""
    chance = random.Random(2)

    async def check():
        async with SpeculativeClient(*checked("model")) as client:
            for _ in range(-(-runs(12) // 4)):
                tasks = [asyncio.create_task(client.generate(chance.choice(prompts), ENDLESS)) for _ in range(4)]
                for task in tasks:
                    await asyncio.sleep(chance.choice([0.0, chance.uniform(0, 0.05), chance.uniform(0, 0.3)]))
                    task.cancel()
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                # A text that repeats itself may fill its slot before its turn to be cancelled comes.
                assert {type(outcome) for outcome in outcomes} <= {asyncio.CancelledError, Result}
                assert type(outcomes[0]) is asyncio.CancelledError
                await asyncio.to_thread(checked.wait_until_free)

    run(check())


def test_sync_streams_closed_early(checked, prompts):
    """Leaving the `with` block of a stream ends its calls; so does closing the client under it."""
    with SyncSpeculativeClient(*checked("model")) as client:
        with client.stream(prompts[3], ENDLESS) as stream:
            next(stream)
        checked.wait_until_free()
        stream = client.stream(prompts[3], ENDLESS)
        next(stream)
    checked.wait_until_free()


def test_out_of_time(checked, prompts):
    """Generations whose time runs out at a random point, 4 at once: a DeadlineError, and free within a second."""
    chance = random.Random(4)

    async def end(client, prompt, seconds):
        with pytest.raises(DeadlineError):
            await client.generate(prompt, ENDLESS, timeout=seconds)

    async def check():
        async with SpeculativeClient(*checked("model")) as client:
            for _ in range(-(-runs(12) // 4)):
                await asyncio.gather(*(end(client, prompts[3], chance.uniform(0.001, 0.3)) for _ in range(4)))
                await asyncio.to_thread(checked.wait_until_free)

    run(check())


def test_client_processes_killed(checked, prompts):
    """Client processes killed at random points of their streams: free within a second each time."""
    chance = random.Random(3)
    left = runs(PROCESSES)
    while left > 0:
        kill_clients(checked, chance.sample(prompts[3:10], min(left, PROCESSES)), chance)
        left -= PROCESSES


def kill_clients(pair, prompts, chance):
    """One client process for each prompt, all at the same time; kills them one after the other."""
    clients = []
    try:
        for prompt in prompts:
            command = [sys.executable, "-c", CLIENT, *pair("model"), *map(str, prompt)]
            clients.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()))
        for client in clients:
            for _ in range(chance.randrange(1, 12)):
                assert client.stdout.readline()
            client.kill()
            client.wait()
        pair.wait_until_free()
    finally:
        for client in clients:
            if client.poll() is None:
                client.kill()
                client.wait()
            client.stdout.close()


def test_raw_calls_cancelled(checked, prompts):
    """Generate and Verify, cancelled before the first response, after it, or half-closed in the middle of a turn."""

    async def check():
        async with target_stub(checked.target.address) as stub:
            for responses in (0, 1, 4):
                call = stub.Generate(target_pb2.GenerateRequest(prompt=ids_prompt(prompts[12])))
                for _ in range(responses):
                    await call.read()
                call.cancel()
            session = await RawSession.open(stub, prompts[12])
            session.call.cancel()
            session = await RawSession.open(stub, prompts[12])
            await session.call.write(target_pb2.VerifyRequest(block=session.block()))
            session.call.cancel()
            session = await RawSession.open(stub, prompts[12])
            await session.send(session.block())
            await session.finish()
        await asyncio.to_thread(checked.wait_until_free)

    run(check())


def test_waiting_for_a_slot(fp32, prompts):
    """Who waits for a slot and goes leaves nothing behind; whose time runs out is told so; who stays gets a slot."""

    async def check():
        async with target_stub(fp32.target.address) as stub:
            holders = [await RawSession.open(stub, prompts[2]) for _ in range(4)]
            gone = [stub.Generate(target_pb2.GenerateRequest(prompt=ids_prompt(prompts[2]))) for _ in range(3)]
            async with SpeculativeClient(*fp32("none")) as client:
                stays = asyncio.create_task(client.generate(prompts[2], PARAMS))
                late = asyncio.create_task(client.generate(prompts[2], PARAMS, timeout=0.5))
                with pytest.raises((DeadlineError, OverloadedError)):
                    await late
                for call in gone:
                    call.cancel()
                assert fp32.target.info().slots_in_use == 4
                holders[0].call.cancel()
                waited = await stays
                for holder in holders[1:]:
                    holder.call.cancel()
                await asyncio.to_thread(fp32.target.wait_until_free)
                assert (await client.generate(prompts[2], PARAMS)).token_ids == waited.token_ids

    run(check())
