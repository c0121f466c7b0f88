"""Generations whose target is lost under way, with in-memory services: how they are run, and what must hold."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from specpair import SamplingParams, Source, SpeculativeClient, UnavailableError

from .. import virtual_time
from .fakes import FINGERPRINT, FakeDraft, FakeTime

PROMPT = (3, 4, 5)
COUNT = 14
PARAMS = SamplingParams(max_new_tokens=COUNT, logprobs=0)
MODES = ["draft:1", "ngram", "none"]
GONE = UnavailableError("the connection broke")
OTHER = replace(FINGERPRINT, vocabulary_sha256="cc")


def client(target, draft=None, mode="draft:1", time=None, targets=None, **options):
    """A client of one target or several, for which time passes only while it waits for a target to be back."""
    targets = targets or [target]
    options = {"draft_timeout": 1.0, "lookup": False, **options}
    opened = SpeculativeClient(
        ",".join(f"target:{n}" for n in range(len(targets))),
        mode,
        target_transport=targets,
        draft_transport=draft or FakeDraft(),
        **options,
    )
    opened._target.timing = (time or FakeTime()).timing
    return opened


def generate(target=None, *args, prompt=PROMPT, params=PARAMS, timeout=None, **options):
    """The result of a generation; its chunks are what it says."""

    async def run():
        async with client(target, *args, **options) as opened:
            stream = opened.stream(prompt, params, timeout=timeout)
            chunks = [chunk async for chunk in stream]
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert tuple(token for chunk in chunks for token in chunk.tokens) == stream.result.tokens
        assert "".join(chunk.text for chunk in chunks) == stream.result.text
        return stream.result

    return virtual_time.run(run())


def turns(prompts, target, *args, params=PARAMS, between=lambda target: None, **options):
    """The results of a session with these prompts; something may happen between each two of them."""

    async def run():
        results = []
        async with client(target, *args, **options) as opened, opened.session() as session:
            for prompt in prompts:
                if results:
                    between(target)
                results.append(await session.generate(prompt, params))
            log = results[-1].prompt_token_ids + results[-1].token_ids
            assert session.token_ids == log
        return results

    return virtual_time.run(run())


def check(result, undisturbed, resumes=1):
    """The same output, none of it lost or twice, with what was known of it before the loss; and each token has one
    source."""
    assert result.token_ids == undisturbed.token_ids
    assert [(token.text, token.logprobs) for token in result.tokens] == [
        (token.text, token.logprobs) for token in undisturbed.tokens
    ]
    assert (result.text, result.finish_reason) == (undisturbed.text, undisturbed.finish_reason)
    assert result.prompt_token_ids == undisturbed.prompt_token_ids
    stats = result.stats
    assert stats.resumes == resumes
    assert stats.output_tokens == stats.accepted + sum(token.source is Source.TARGET for token in result.tokens)
    assert sum(stats.accepted_by_source.values()) == stats.accepted
