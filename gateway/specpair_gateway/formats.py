"""Answers as OpenAI writes them: whole, and piece by piece."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from specpair import Chunk, FinishReason, Result, Source, Token
from specpair_gateway.generations import Generations
from specpair_gateway.vocabulary import Vocabulary

__all__ = ["Format", "finish_reason", "json_logprob"]

_FINISH = {
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.MAX_NEW_TOKENS: "length",
    FinishReason.CACHE_FULL: "length",
}
# Written for a probability of 0, whose logarithm no JSON number can be.
_IMPOSSIBLE = -9999.0


class Format(ABC):
    """One answer of a model, whose prompts have `choices` each, the first of them sampled with `seed`.

    `vocabulary` is None for answers without log probabilities. A subclass says what OpenAI calls the answer, whole and
    in pieces, and what its id begins with.
    """

    whole_object: str
    piece_object: str
    prefix: str

    def __init__(self, model: str, choices: int, seed: int | None, vocabulary: Vocabulary | None) -> None:
        self._choices_each = choices
        self._seed = seed
        self._vocabulary = vocabulary
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """The answer at once."""
        for result in results:
            await self._learn(result.tokens)
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self.usage(results)}

    async def pieces(self, running: Generations, *, with_usage: bool) -> AsyncGenerator[dict[str, Any]]:
        """The answer as it comes, with statistics at its end if asked for. Raises what the generations raise."""
        head: dict[str, Any] = {**self._head, "object": self.piece_object}
        if with_usage:
            head["usage"] = None  # of every piece but the last
        async with running:
            async for index, chunk in running:
                await self._learn(chunk.tokens)
                for choice in self._pieces(index, chunk):
                    yield {**head, "choices": [choice]}
            if with_usage:
                yield {**head, "choices": [], "usage": self.usage(running.results)}

    def usage(self, results: Sequence[Result]) -> dict[str, Any]:
        """Tokens of an answer, and how they were speculated.

        Predicted tokens count by who proposed them: a token of the prediction that the target computed by itself, as
        the last one of every block, is neither accepted nor rejected.
        """
        stats = [result.stats for result in results]
        prompt = sum(one.prompt_tokens for one in stats[:: self._choices_each])
        completion = sum(one.output_tokens for one in stats)
        accepted = sum(one.accepted_by_source.get(Source.PREDICTION, 0) for one in stats)
        proposed = sum(one.proposed_by_source.get(Source.PREDICTION, 0) for one in stats)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": proposed - accepted,
            },
            "specpair": {
                "accepted": sum(one.accepted for one in stats),
                "proposed": sum(one.proposed for one in stats),
                "rounds": sum(one.rounds for one in stats),
                "seed": self._seed,
            },
        }

    @abstractmethod
    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        """One choice, whole."""

    @abstractmethod
    def _pieces(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """What a chunk adds to a choice: one piece, several or none."""

    async def _learn(self, tokens: Sequence[Token]) -> None:
        if self._vocabulary is not None:
            top = [token_id for token in tokens if token.logprobs for token_id, _ in token.logprobs.top]
            await self._vocabulary.learn([*top, *(token.id for token in tokens)])


def finish_reason(reason: FinishReason | None) -> str | None:
    """OpenAI's word for the end of a choice."""
    return None if reason is None else _FINISH[reason]


def json_logprob(logprob: float) -> float:
    """A log probability as JSON can carry it."""
    return max(logprob, _IMPOSSIBLE)
