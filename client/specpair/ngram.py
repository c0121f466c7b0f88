"""Prompt lookup: what followed the last time the text went like this.

Needs the standard library only. The idea: Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["NgramIndex"]


class NgramIndex:
    """The continuations of every n-gram of a growing list of token ids, min_ngram <= n <= max_ngram.

    Appending a token costs max_ngram - min_ngram + 1 dictionary writes, however long the list is.
    """

    def __init__(self, token_ids: Iterable[int] = (), *, min_ngram: int = 2, max_ngram: int = 4) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError("1 <= min_ngram <= max_ngram must hold")
        self._token_ids: list[int] = []
        # For each n, longest first: n-gram -> position behind its last occurrence.
        self._behind: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(max_ngram, min_ngram - 1, -1)}
        self.extend(token_ids)

    def __len__(self) -> int:
        return len(self._token_ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Appends several tokens."""
        for token_id in token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Appends one token."""
        # The n-grams that end before this token have a continuation from now on; those that end with it have none
        # yet, so that the end of the list never finds itself.
        position = len(self._token_ids)
        for n, behind in self._behind.items():
            if n <= position:
                behind[tuple(self._token_ids[position - n :])] = position
        self._token_ids.append(token_id)

    def lookup(self, max_tokens: int) -> list[int]:
        """Up to `max_tokens` ids that followed the last earlier occurrence of the longest n-gram at the end.

        A continuation that runs into the end of the list goes on in itself, so that a loop in the text is continued
        for as long as asked, as in Lempel-Ziv 1977. Empty if no n-gram at the end occurred before.
        """
        for n, behind in self._behind.items():
            if n < len(self._token_ids) and (start := behind.get(tuple(self._token_ids[-n:]))) is not None:
                period = len(self._token_ids) - start
                return [self._token_ids[start + i % period] for i in range(max_tokens)]
        return []
