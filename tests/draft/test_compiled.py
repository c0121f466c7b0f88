"""The compiled draft step: the same guesses, and nothing left to compile once it is warm."""

from __future__ import annotations

import asyncio
import os
import shutil

import pytest

from specpair.v1.common_pb2 import Source
from specpair_draft.asks import Ask, Turn
from specpair_runtime.sampling.params import GREEDY, SamplingParams

from ..tiny import random_ids

PARAMS = [GREEDY, SamplingParams(temperature=1.0, seed=3), SamplingParams(temperature=0.8, rejection=True)]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
# torch warns about itself while its compiler is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_draft_says_the_same_and_compiles_nothing_later(load, engine):
    """Sessions alone and together, catching up, running ahead, and across an attended length: guesses that stay on
    the device have the shapes that the warm-up has seen."""
    compiled = load("llama-small", compile="on", slots=2)
    assert compiled.model.runner.compiled

    async def session(of, prompt, params):
        said = []
        async with of.proposer(Source.SOURCE_MODEL) as proposer:
            proposer.begin(Turn(prompt, len(prompt), params))
            for kept in (0, 2, 4, 1):
                answers = asyncio.Queue()
                news = [*said[-1][:kept], 7] if said else []
                proposer.ask(Ask(proposer.length, news, 4), answers.put_nowait)
                said.append((await answers.get()).proposal.token_ids)
        return said

    async def talk(of):
        alone = [
            await session(of, random_ids(length), params) for length, params in zip((5, 40, 249), PARAMS, strict=True)
        ]
        both = await asyncio.gather(session(of, random_ids(60), GREEDY), session(of, random_ids(250), PARAMS[1]))
        return [*alone, *both]

    assert asyncio.run(talk(compiled)) == asyncio.run(talk(engine))
    assert compiled.model.recompilations.count == 0
