"""What single tokens look like."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from specpair import SpeculativeClient

__all__ = ["Vocabulary"]

# Some tokenizers drop the space that a text begins with, so tokens are shown behind this one.
_BEFORE = "a"
# Questions that are under way at a time.
_AT_ONCE = 32


class Vocabulary:
    """The texts of tokens, asked of the target once each. Serves one request: the next one may meet another model."""

    def __init__(self, client: SpeculativeClient) -> None:
        self._client = client
        self._texts: dict[int, str] = {}
        self._before: tuple[int, ...] | None = None
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def learn(self, token_ids: Iterable[int]) -> None:
        """Finds out about those that are not known yet. Raises what the client raises."""
        if self._before is None:
            self._before = (await self._client.tokenize(_BEFORE))[-1:]
            self._before_text = await self._client.detokenize(self._before, keep_special_tokens=True)
        unknown = sorted(set(token_ids) - self._texts.keys())
        self._texts.update(zip(unknown, await asyncio.gather(*map(self._ask, unknown)), strict=True))

    def text(self, token_id: int) -> str:
        """The text of a token that was learned; one that is a part of a character has U+FFFD in it."""
        return self._texts[token_id]

    async def _ask(self, token_id: int) -> str:
        assert self._before is not None, "asked by `learn`"
        async with self._turns:
            text = await self._client.detokenize((*self._before, token_id), keep_special_tokens=True)
        return text.removeprefix(self._before_text)
