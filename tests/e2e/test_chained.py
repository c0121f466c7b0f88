"""Blocks sent ahead of their verdicts, through a slow network: the same tokens, none lost, none twice."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from specpair import FinishReason, SamplingParams, Source, SpeculativeClient

from ..proxy import TcpProxy
from .drafts import half_true, prophet, serving
from .processes import UNHURRIED, run

COUNT = 40
GREEDY = SamplingParams(max_new_tokens=COUNT)
SAMPLED = SamplingParams(max_new_tokens=COUNT, temperature=0.8, top_p=0.95, seed=5)
DELAY = 0.01


@pytest.fixture
def far(bf16):
    """Addresses of target and draft for a proposer, a slow network before each service."""
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(TcpProxy.to(bf16.target.address, delay=DELAY))
        draft = stack.enter_context(TcpProxy.to(bf16.draft.address, delay=DELAY))
        yield lambda kind: (target.address, draft.address if kind == "model" else kind)


@pytest.fixture(scope="module")
def chosen(prompts):
    """A few prompts, one of them near the end of the first attended length."""
    return [prompts[7], prompts[11], prompts[-1]]


@pytest.fixture(scope="module")
def alone(bf16_target, chosen):
    """Results of the target alone, by prompt and parameters."""

    async def generate():
        async with SpeculativeClient(bf16_target.address, "none") as client:
            return {
                (prompt, params): await client.generate(prompt, params)
                for prompt in chosen
                for params in (GREEDY, SAMPLED)
            }

    return run(generate())


async def generate_all(addresses, jobs, **options):
    async with SpeculativeClient(*addresses, **options) as client:
        return await asyncio.gather(*(client.generate(prompt, params) for prompt, params in jobs))


@pytest.mark.parametrize("chain", [1, 3, None])
@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_the_same_tokens(far, alone, kind, chain):
    """Greedy and sampled, with a model and with lookups, with fixed chains and with those that pay."""
    results = run(generate_all(far(kind), list(alone), chain=chain, draft_timeout=UNHURRIED))
    for result, expected in zip(results, alone.values(), strict=True):
        assert result.token_ids == expected.token_ids
        assert (result.text, result.finish_reason) == (expected.text, expected.finish_reason)
        assert result.stats.stale == 0
        assert result.stats.proposer_changes == ()
        assert result.stats.rounds + result.stats.accepted == COUNT


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("behaviour", "dropped"), [(prophet, False), (half_true, True)])
def test_blocks_go_ahead(far, alone, chosen, params, behaviour, dropped):
    """With a draft that knows all, every block comes true; with one that errs in every proposal, blocks are dropped."""
    target, _ = far("none")
    prompt = chosen[0]  # which stays below the first border of attended lengths, where every block ends
    told = alone[prompt, params].token_ids
    with serving(behaviour({prompt: told})) as fake, TcpProxy.to(fake.address, delay=DELAY) as draft:
        addresses = (target, draft.address)
        [result] = run(generate_all(addresses, [(prompt, params)], chain=3, draft_length=3, lookup=False))
    assert result.token_ids == told
    assert (result.stats.dropped > 0) == dropped
    assert result.stats.rounds_by_source.keys() <= {Source.MODEL, Source.TARGET}


def test_the_network_decides(bf16, far, alone, chosen):
    """Left to itself a chain comes on where the way is long and everything comes true."""
    told = {chosen[0]: alone[chosen[0], GREEDY].token_ids}
    with serving(prophet(told)) as fake, TcpProxy.to(bf16.target.address, delay=0.2) as target:
        addresses = (target.address, fake.address)
        long = run(generate_all(addresses, [(chosen[0], GREEDY)], draft_length=1, lookup=False))[0]
    assert long.token_ids == told[chosen[0]]
    # Twenty rounds one after the other would take eight seconds at least on the way alone.
    assert long.stats.wire_seconds < 20 * 0.4


def test_stop_strings_and_log_probabilities(far, bf16, alone, chosen):
    """What ends a turn inside a chain ends it there; values are those of the target alone."""
    prompt = chosen[1]
    text = alone[prompt, GREEDY].text
    params = SamplingParams(max_new_tokens=COUNT, stop=(text[len(text) // 2 :][:3],), logprobs=2)

    async def both():
        async with SpeculativeClient(bf16.target.address, "none") as plain:
            expected = await plain.generate(prompt, params)
        [result] = await generate_all(far("model"), [(prompt, params)], chain=3)
        return expected, result

    expected, result = run(both())
    assert expected.finish_reason is FinishReason.STOP_STRING
    assert (result.text, result.stop_string) == (expected.text, expected.stop_string)
    assert [(token.id, token.text, token.logprobs) for token in result.tokens] == [
        (token.id, token.text, token.logprobs) for token in expected.tokens
    ]


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_turns(far, bf16, chosen, kind):
    """A session's next turn begins while blocks of the last one are still answered."""
    turns = [chosen[0], (5, 6, 7), "\n\ndef main():\n"]

    async def talk(addresses, **options):
        async with SpeculativeClient(*addresses, **options) as client, client.session() as session:
            return [(await session.generate(turn, GREEDY)).token_ids for turn in turns]

    async def both():
        return await talk((bf16.target.address, "ngram"), chain=0), await talk(far(kind), chain=3)

    expected, chained = run(both())
    assert chained == expected


def test_cancelled_in_mid_chain(far, bf16, chosen):
    """Both slots are free at once, whatever was under way."""

    async def leave(after):
        async with (
            SpeculativeClient(*far("model"), chain=3) as client,
            client.stream(chosen[0], SamplingParams(max_new_tokens=200)) as stream,
        ):
            async for _ in stream:
                if len(stream.tokens) > after:
                    break

    for after in (0, 9, 30):
        run(leave(after))
        bf16.target.wait_until_free()
        bf16.draft.wait_until_free()
