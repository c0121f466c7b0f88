"""A bad network costs time and never a token: to the draft nothing but time, to the target at worst a typed error."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from specpair import SamplingParams, SpecpairError, SpeculativeClient

from ..amounts import runs
from ..proxy import TcpProxy
from .processes import run

COUNT = 24
GREEDY = SamplingParams(max_new_tokens=COUNT)
SAMPLED = SamplingParams(max_new_tokens=COUNT, temperature=0.8, top_p=0.95, seed=5)
# Seconds that end a generation whose bytes vanish on the way to the target, and any other. What comes on top stands for
# "does not hang".
SHORT, LONG = 1.5, 20.0
SLACK = 10.0
# Who asks at the same time: parameters, proposer, blocks ahead of their verdicts.
ASKED = [(GREEDY, "model", 0), (SAMPLED, "model", 2), (SAMPLED, "none", 0), (GREEDY, "ngram", 0)]


@dataclass(frozen=True)
class Fault:
    """What becomes of a network, and for how long."""

    strike: Callable[[TcpProxy, random.Random], None]
    seconds: float = 0.3
    lossy: bool = False
    """Whether bytes vanish without a trace. A sender that waits for an answer cannot tell that from a slow service:
    what ends the wait is the caller's time."""


def afflicted(*ways, **toxics):
    """A network with toxics."""
    return Fault(lambda proxy, _: proxy.afflict(*ways, **toxics))


def _refuse(proxy, _):
    proxy.down()
    proxy.cut()


def _limit(way):
    return Fault(lambda proxy, chance: proxy.afflict(way, limit_data=chance.randrange(2000)))


def _swallow(way):
    return Fault(lambda proxy, _: proxy.afflict(way, timeout=True), lossy=True)


FAULTS = {
    "latency": afflicted(latency=0.03, jitter=0.03),
    "bandwidth": afflicted(bandwidth=8000),
    "slicer": afflicted(slicer=5, slicer_pause=0.001),
    "slow_close": afflicted(slow_close=0.5),
    "stall": afflicted(stall=True),
    "timeout upstream": _swallow("upstream"),
    "timeout downstream": _swallow("downstream"),
    "limit_data upstream": _limit("upstream"),
    "limit_data downstream": _limit("downstream"),
    "half-close upstream": Fault(lambda proxy, _: proxy.half_close("upstream")),
    "half-close downstream": Fault(lambda proxy, _: proxy.half_close("downstream")),
    "reset_peer": Fault(lambda proxy, _: proxy.reset_peer()),
    "cut": Fault(lambda proxy, _: proxy.cut()),
    "down": Fault(_refuse),
}


@pytest.fixture(scope="module")
def expected(bf16_target, prompts):
    """Tokens by parameters, with nobody and nothing in between."""

    async def alone():
        async with SpeculativeClient(bf16_target.address, "none") as client:
            return {params: (await client.generate(prompts[8], params)).token_ids for params in (GREEDY, SAMPLED)}

    return run(alone())


async def generate(client, prompt, params, within, strike):
    """Token ids, or the typed error that came instead; `strike(tokens)` may do so at the start and behind any chunk."""
    begun = asyncio.get_running_loop().time()
    outcome = None
    try:
        async with client.stream(prompt, params, timeout=within) as stream:
            await strike(0)
            async for _ in stream:
                await strike(len(stream.tokens))
        outcome = stream.result.token_ids
    except SpecpairError as error:
        outcome = error
    assert asyncio.get_running_loop().time() - begun < within + SLACK
    return outcome


async def struck(proxy, fault, chance, clients, prompt, within):
    """What becomes of everything that is ASKED while the fault strikes once, at a random token, and heals."""
    at = chance.randrange(COUNT // 2)
    healed = []

    async def heal():
        await asyncio.sleep(fault.seconds)
        await asyncio.to_thread(proxy.heal)

    async def strike(tokens):
        if tokens >= at and not healed:
            healed.append(asyncio.create_task(heal()))
            await asyncio.to_thread(fault.strike, proxy, chance)

    outcomes = await asyncio.gather(
        *(
            generate(client, prompt, params, within, strike)
            for client, (params, _, _) in zip(clients, ASKED, strict=True)
        )
    )
    await asyncio.gather(*healed)
    if fault.lossy:
        # A connection that has lost bytes is none any more.
        await asyncio.to_thread(proxy.cut)
    return outcomes


async def undisturbed(clients, prompt):
    """What the same clients get when all is well again."""
    return await asyncio.gather(
        *(client.generate(prompt, params) for client, (params, _, _) in zip(clients, ASKED, strict=True))
    )


async def bad_runs(addresses, proxy, fault, chance, prompt, expected, within=LONG):
    """Yields the outcomes of each run, every time with new clients; then these have a good one."""
    for _ in range(runs(1)):
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    SpeculativeClient(*addresses(kind), chain=chain, draft_timeout=0.5, connect_timeout=2.0)
                )
                for _, kind, chain in ASKED
            ]
            await asyncio.gather(*(client.info() for client in clients))
            yield await struck(proxy, fault, chance, clients, prompt, within)
            for result, (params, _, _) in zip(await undisturbed(clients, prompt), ASKED, strict=True):
                assert result.token_ids == expected[params]


@pytest.mark.parametrize("name", FAULTS)
def test_on_the_way_to_the_target(bf16, prompts, expected, name):
    """The same tokens; only where bytes vanish without a trace perhaps a typed error, when the caller's time is up."""
    fault, chance = FAULTS[name], random.Random(name)
    within = SHORT if fault.lossy else LONG

    async def check(proxy):
        def addresses(kind):
            return proxy.address, bf16(kind)[1]

        async for outcomes in bad_runs(addresses, proxy, fault, chance, prompts[8], expected, within):
            for outcome, (params, _, _) in zip(outcomes, ASKED, strict=True):
                if not (fault.lossy and isinstance(outcome, SpecpairError)):
                    assert outcome == expected[params], repr(outcome)
            await asyncio.to_thread(bf16.check)

    with TcpProxy.to(bf16.target.address) as proxy:
        run(check(proxy), 60 * runs(1))


@pytest.mark.parametrize("name", FAULTS)
def test_on_the_way_to_the_draft(bf16, prompts, expected, name):
    """The same tokens and no error: the draft is advice."""
    fault, chance = FAULTS[name], random.Random(name)

    async def check(proxy):
        def addresses(kind):
            return bf16.target.address, proxy.address if kind == "model" else kind

        async for outcomes in bad_runs(addresses, proxy, fault, chance, prompts[8], expected):
            assert outcomes == [expected[params] for params, _, _ in ASKED]
            await asyncio.to_thread(bf16.check)

    with TcpProxy.to(bf16.draft.address) as proxy:
        run(check(proxy), 60 * runs(1))
