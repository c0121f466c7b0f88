"""Answers of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specpair import Chunk, Result, Token
from specpair_gateway.formats import Format, finish_reason, json_logprob
from specpair_gateway.vocabulary import Vocabulary

__all__ = ["ChatFormat"]


class ChatFormat(Format):
    """Messages of an assistant."""

    whole_object = "chat.completion"
    piece_object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, model: str, choices: int, seed: int | None, vocabulary: Vocabulary | None) -> None:
        super().__init__(model, choices, seed, vocabulary)
        self._begun: set[int] = set()

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": self._logprobs(result.tokens),
            "finish_reason": finish_reason(result.finish_reason),
        }

    def _pieces(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        pieces = []
        if index not in self._begun:
            self._begun.add(index)
            pieces.append(_piece(index, {"role": "assistant", "content": ""}))
        logprobs = self._logprobs(chunk.tokens)
        if chunk.text or logprobs is not None:
            pieces.append(_piece(index, {"content": chunk.text}, logprobs=logprobs))
        if chunk.finish_reason is not None:
            pieces.append(_piece(index, {}, finish=finish_reason(chunk.finish_reason)))
        return pieces

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if (vocabulary := self._vocabulary) is None:
            return None
        content = [
            {
                **_entry(vocabulary, token.id, token.logprobs.chosen),
                "top_logprobs": [_entry(vocabulary, *top) for top in token.logprobs.top],
            }
            for token in tokens
            if token.logprobs is not None
        ]
        return {"content": content, "refusal": None}


def _entry(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, Any]:
    text = vocabulary.text(token_id)
    # Nobody here knows the bytes of a part of a character.
    encoded = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": json_logprob(logprob), "bytes": encoded}


def _piece(
    index: int, delta: dict[str, str], *, logprobs: dict[str, Any] | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
