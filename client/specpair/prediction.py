"""What a caller expects as the output, read along with the real one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from specpair.errors import InvalidRequestError
from specpair.ngram import Match, NgramIndex
from specpair.params import Prediction
from specpair.transports import TargetTransport

__all__ = ["PredictedOutput", "predicted_ids", "without_prefix"]

# Ids on the wire are unsigned numbers of 32 bits.
_MOST_ID = 2**32 - 1

# After a difference the output's last token is looked for among so many of the prediction's next ones.
_WINDOW = 32
# So many tokens at the end of the output are looked for in the prediction as a whole.
_CONTEXT = 256


class _Reading(NamedTuple):
    """How an output stands to its prediction."""

    place: int
    """Where the prediction goes on."""
    agreed: int
    """Tokens at the end of the output that stand before the place too; 0 if the place is a guess."""


class PredictedOutput:
    """Follows an output through what was expected of it.

    The beginning of the prediction continues the prompt, and each of its tokens the one before it as long as the output
    is what was expected. After a difference the prediction goes on where the last tokens of the output stand in it, the
    most of them and nearest to where it was left; else where the last one stands a little further on; else behind the
    token that was not expected, as if it stood for one of the prediction's.

    `prompt_length` is where the output begins in the log.
    """

    def __init__(self, token_ids: Sequence[int], prompt_length: int) -> None:
        self._token_ids = tuple(token_ids)
        self._index = NgramIndex(token_ids)
        self._read = prompt_length
        # Whoever gives a prediction vouches for its beginning: as if all of it had been found.
        self._reading = _Reading(0, len(self._token_ids))

    def find(self, log: Sequence[int], committed: int, max_tokens: int) -> Match:
        """What the prediction says behind a log, of which the first `committed` tokens are never taken back."""
        known = log[max(committed - _CONTEXT, 0) : committed]
        self._reading = self._follow(self._reading, log[self._read : committed], known)
        self._read = max(committed, self._read)
        place, agreed = self._follow(self._reading, log[committed:], log[-_CONTEXT:])
        return Match(self._token_ids[place : place + max_tokens], agreed)

    def _follow(self, reading: _Reading, news: Sequence[int], known: Sequence[int]) -> _Reading:
        """The reading behind some more tokens, which are the last of those that are known."""
        place, agreed = reading
        for token in news:
            met = place < len(self._token_ids) and self._token_ids[place] == token
            place, agreed = place + 1, agreed + 1 if met else 0
        if agreed or not news:
            return _Reading(place, agreed)
        found, length = self._index.search(known, near=place)
        if length:
            return _Reading(found, length)
        ahead = self._token_ids[place : place + _WINDOW]
        if known[-1] in ahead:
            return _Reading(place + ahead.index(known[-1]) + 1, 1)
        return _Reading(min(place, len(self._token_ids)), 0)


async def predicted_ids(target: TargetTransport, expected: Prediction) -> tuple[int, ...]:
    """The ids of a prediction; of text, those that the target has for it by itself.

    Raises InvalidRequestError for what is neither text nor ids or does not fit a slot of the target.
    """
    if isinstance(expected, str):
        return await _tokenized(target, expected) if expected else ()
    if isinstance(expected, bytes) or not isinstance(expected, Sequence) or not all(map(_is_id, expected)):
        raise InvalidRequestError("must be text or token ids", field="prediction")
    return tuple(map(int, expected))


async def _tokenized(target: TargetTransport, text: str) -> tuple[int, ...]:
    try:
        ids = await target.tokenize(text)
    except InvalidRequestError as refused:
        raise InvalidRequestError(refused.message, field="prediction") from refused
    return await without_prefix(ids, lambda first: target.detokenize(first, False))


def _is_id(value: object) -> bool:
    return isinstance(value, int) and 0 <= value <= _MOST_ID


async def without_prefix(
    token_ids: tuple[int, ...], detokenize: Callable[[tuple[int, ...]], Awaitable[str]]
) -> tuple[int, ...]:
    """Token ids of a text, less the special tokens that the tokenizer begins every text with."""
    while token_ids and not await detokenize(token_ids[:1]):
        token_ids = token_ids[1:]
    return token_ids
