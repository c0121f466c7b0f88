"""Eight clients at once, and an accident in their middle: what they must end with."""

from __future__ import annotations

import asyncio
import itertools

from specpair import SamplingParams, SpeculativeClient

TOKENS = 160
# Tokens that every client has got when the accident happens.
_BEFORE = 16
_TEXTS = [
    "import os\nimport sys\n\n\ndef main():\n    ",
    "class Stack:\n    def __init__(self):\n",
    "for i in range(10):\n",
    "def read(path):\n    with open(path) as file:\n",
]
_PARAMS = [
    SamplingParams(max_new_tokens=TOKENS, ignore_eos=True),
    SamplingParams(max_new_tokens=TOKENS, ignore_eos=True, temperature=0.9, top_p=0.95, seed=11),
]
# What each of the clients asks for.
WANTED = tuple(itertools.product(_TEXTS, _PARAMS))


async def alone(target):
    """What a target says to each of them by itself."""
    async with SpeculativeClient(target, "none") as client:
        return [(await client.generate(text, params)).token_ids for text, params in WANTED]


async def together(target, draft, accident=lambda: None):
    """The results of all clients, which run at once; `accident` happens when each of them has got some tokens."""
    begun = asyncio.Barrier(len(WANTED) + 1)

    async def generate(text, params):
        # A client each: nobody is told by another one that something was lost.
        async with SpeculativeClient(target, draft) as client, client.stream(text, params) as stream:
            count = 0
            async for chunk in stream:
                count += len(chunk.tokens)
                if count - len(chunk.tokens) < _BEFORE <= count:
                    await begun.wait()
        assert [token.id for token in stream.result.tokens] == list(stream.result.token_ids)
        return stream.result

    async def happen():
        await begun.wait()
        await asyncio.to_thread(accident)

    *results, _ = await asyncio.gather(*(generate(text, params) for text, params in WANTED), happen())
    return results


def check(results, expected):
    """No token is lost, none comes twice, and all are those of a target by itself."""
    assert [result.token_ids for result in results] == expected
    assert {result.stats.output_tokens for result in results} == {TOKENS}
