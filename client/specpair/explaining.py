"""What `specpair explain` asks the target besides the explanation itself: ids for texts and texts for ids."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from specpair.client import SpeculativeClient
from specpair.errors import InvalidRequestError
from specpair.prediction import without_prefix

__all__ = ["continuation_ids", "parse_ids", "texts_of"]


def parse_ids(text: str, field: str) -> tuple[int, ...]:
    """The ids of a list such as "1,2,3"."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InvalidRequestError(f"{text!r} is not a list of token ids like 1,2,3", field=field) from None


async def continuation_ids(client: SpeculativeClient, prompt: str, text: str) -> tuple[int, ...]:
    """The ids of a text behind a prompt: those that both together add to the prompt's.

    Where the two melt into other tokens at the border, the ids of the text by itself, less the special tokens that the
    tokenizer begins a text with.
    """
    before, whole, alone = await asyncio.gather(*map(client.tokenize, (prompt, prompt + text, text)))
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return await without_prefix(alone, client.detokenize)


async def texts_of(client: SpeculativeClient, token_ids: Iterable[int]) -> dict[int, str]:
    """The text of each id by itself."""
    ids = sorted(set(token_ids))
    return dict(
        zip(
            ids, await asyncio.gather(*(client.detokenize([id_], keep_special_tokens=True) for id_ in ids)), strict=True
        )
    )
