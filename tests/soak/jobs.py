"""What the clients of a soak ask for, and what they have to get."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from specpair import AcceptanceRule, ChatMessage, SamplingParams, SpeculativeClient

from ..e2e.processes import DEMO

_TOKENS = 40
_GREEDY = SamplingParams(max_new_tokens=_TOKENS)
_SAMPLED = SamplingParams(max_new_tokens=_TOKENS, temperature=0.8, top_p=0.95, seed=5)
_PENALIZED = SamplingParams(max_new_tokens=_TOKENS, temperature=1.0, seed=9, repetition_penalty=1.2, logprobs=1)
_REJECTION = SamplingParams(max_new_tokens=_TOKENS, temperature=0.8, rule=AcceptanceRule.REJECTION)
_QUESTIONS = ["Name a prime.", "Write a loop.", "What is a list?"]
_LATER = "\n\n\nclass Stack:\n"


@dataclass(frozen=True)
class Job:
    """The prompts of a session's turns, most often of one alone, and what has to come of each turn.

    `expected` None: the rejection rule promises a distribution and no tokens.
    """

    turns: tuple[str | Sequence[ChatMessage], ...]
    params: SamplingParams
    expected: tuple[tuple[int, ...], ...] | None = None


async def jobs(client: SpeculativeClient, texts: int) -> list[Job]:
    """Jobs on so many texts with what an undisturbed target answers to them, one after the other.

    `client` has no draft. There are chats among them if the target knows chats.
    """
    lines = (DEMO / "heldout.jsonl").read_text().splitlines()
    prompts: list[str] = [json.loads(line)["text"] for line in lines[:texts]]
    asked = [Job((text,), params) for text in prompts for params in (_GREEDY, _SAMPLED)]
    asked += [Job((text,), _PENALIZED) for text in prompts[:2]]
    asked += [Job((text, _LATER), params) for text in prompts[:2] for params in (_GREEDY, _SAMPLED)]
    target, _ = await client.info()
    if target.chat:
        asked += [Job(([{"role": "user", "content": question}],), _GREEDY) for question in _QUESTIONS]
    return [await _answered(client, job) for job in asked] + [Job((text,), _REJECTION) for text in prompts[:3]]


async def _answered(client: SpeculativeClient, job: Job) -> Job:
    async with client.session() as session:
        results = [await session.generate(turn, job.params) for turn in job.turns]
    return Job(job.turns, job.params, tuple(result.token_ids for result in results))
