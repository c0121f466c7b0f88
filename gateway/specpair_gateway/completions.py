"""Answers of /v1/completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from specpair import Chunk, FinishReason, Result, Token
from specpair_gateway.formats import Format, finish_reason, json_logprob
from specpair_gateway.vocabulary import Vocabulary

__all__ = ["CompletionFormat"]


class CompletionFormat(Format):
    """Continued texts."""

    whole_object = piece_object = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, choices: int, seed: int | None, vocabulary: Vocabulary | None) -> None:
        super().__init__(model, choices, seed, vocabulary)
        self._lengths: Counter[int] = Counter()

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        return self._part(index, result.text, result.tokens, result.finish_reason)

    def _pieces(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        if not chunk.text and chunk.finish_reason is None and self._vocabulary is None:
            return []
        return [self._part(index, chunk.text, chunk.tokens, chunk.finish_reason)]

    def _part(self, index: int, text: str, tokens: Sequence[Token], finish: FinishReason | None) -> dict[str, Any]:
        logprobs = self._logprobs(tokens, self._lengths[index])
        self._lengths[index] += len(text)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(finish)}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        """Here tokens are what each of them adds to the text, so that they are the text, one behind the other."""
        if (vocabulary := self._vocabulary) is None:
            return None
        tokens = [token for token in tokens if token.logprobs is not None]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [json_logprob(token.logprobs.chosen) for token in tokens if token.logprobs],
            "top_logprobs": [_top(vocabulary, token) for token in tokens],
            "text_offset": list(accumulate((len(token.text) for token in tokens), initial=offset))[:-1],
        }


def _top(vocabulary: Vocabulary, token: Token) -> dict[str, float]:
    """The most probable tokens and the chosen one. Of several with one text the most probable counts."""
    if token.logprobs is None:
        return {}
    found: dict[str, float] = {}
    for token_id, logprob in (*token.logprobs.top, (token.id, token.logprobs.chosen)):
        found.setdefault(vocabulary.text(token_id), json_logprob(logprob))
    return found
