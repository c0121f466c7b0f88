"""Prompt lookup: what followed the last time the text went like this.

Needs the standard library only. The idea: Saxena 2023, "Prompt Lookup Decoding"; the chains: Deutsch and Gailly 1996,
RFC 1951, section 4.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Match", "NgramIndex"]

# Between two texts in one index. No token has this id, so no match reaches across it.
_BORDER = -1


@dataclass(frozen=True, slots=True)
class Match:
    """A continuation, and how much of the text before it was found again."""

    token_ids: tuple[int, ...] = ()
    length: int = 0
    """Tokens at the end of the text that stand before the continuation too; 0 if nothing was found."""


class NgramIndex:
    """The places of all pairs of neighbours in a growing list of token ids.

    Appending a token costs the same however long the list is: a pair leads to its last place, and each place to the one
    before it with the same pair. A search walks that chain, latest place first, for at most `most_places` places, so
    that a text which is all one pair does not make it slow. Matches shorter than `min_ngram` do not count.
    """

    def __init__(self, token_ids: Iterable[int] = (), *, min_ngram: int = 2, most_places: int = 1024) -> None:
        if min_ngram < 1 or most_places < 1:
            raise ValueError("min_ngram and most_places must be at least 1")
        self._min_ngram = min_ngram
        self._most_places = most_places
        self._token_ids: list[int] = []
        # A place is the position behind an n-gram. `_before[place]` is the place before it with the same pair, or -1.
        self._pairs: dict[int, int] = {}
        self._before = array("i")
        self._singles: dict[int, int] = {}
        # The best place for the first `_seen` tokens, and how many tokens match there.
        self._seen, self._place, self._length = 0, 0, 0
        self.extend(token_ids)

    def __len__(self) -> int:
        return len(self._token_ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Appends several tokens."""
        for token_id in token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Appends one token."""
        # The pair before this token has a continuation from now on; the one that ends with it has none yet, so that the
        # end of the list never finds itself.
        ids = self._token_ids
        place = len(ids)
        before = -1
        if place > 1:
            pair = ids[-2] << 32 | ids[-1]
            before = self._pairs.get(pair, -1)
            self._pairs[pair] = place
        if place and self._min_ngram == 1:
            self._singles[ids[-1]] = place
        self._before.append(before)
        ids.append(token_id)

    def cut(self) -> None:
        """Ends a text: no match and no continuation reaches from what was appended before to what comes behind."""
        if self._token_ids:
            self._before.append(-1)
            self._token_ids.append(_BORDER)

    def lookup(self, max_tokens: int, tail: Sequence[int] = ()) -> list[int]:
        """The ids that `find` finds."""
        return list(self.find(max_tokens, tail).token_ids)

    def find(self, max_tokens: int, tail: Sequence[int] = ()) -> Match:
        """Up to `max_tokens` ids that followed the longest match of the list's end, the latest of equally long ones.

        A continuation that runs into the end of the list goes on in itself, so that a loop in the text is continued
        for as long as asked, as in Lempel-Ziv 1977. `tail` is looked up behind the list, which it does not change.
        """
        if not tail:
            place, length = self._at_end()
        elif (extended := self._extended(tail)) is not None:
            place, length = extended
        else:
            place, length = self.search((*self._token_ids[-self._most_places :], *tail))
        if not length:
            return Match()
        ids = self._token_ids
        size = len(ids)
        period = size + len(tail) - place
        loop = (place + i % period for i in range(max_tokens))
        return Match(tuple(ids[at] if at < size else tail[at - size] for at in loop), length)

    def find_behind(self, text: Sequence[int], max_tokens: int) -> Match:
        """The same for the end of another text; the continuation ends where the text that it stands in ends.

        Of equally long matches the latest with the most of `max_tokens` behind it counts.
        """
        place, length = self.search(text, room=max_tokens)
        return Match(self.read(place, max_tokens), length) if length else Match()

    def read(self, place: int, max_tokens: int) -> tuple[int, ...]:
        """Up to `max_tokens` ids from a place on, to the end of the text that it stands in."""
        ids = self._token_ids[place : place + max_tokens]
        return tuple(ids[: ids.index(_BORDER)] if _BORDER in ids else ids)

    def search(self, text: Sequence[int], *, near: int | None = None, room: int = 0) -> tuple[int, int]:
        """The place behind the longest match of a text's end, and its length; (0, 0) if there is none.

        Of equally long ones the latest place counts, or the nearest to `near`, or the latest of those with the most of
        `room` tokens behind them.
        """
        ids, size = self._token_ids, len(text)
        best_place, best, best_room = 0, 0, 0
        place = self._pairs.get(text[-2] << 32 | text[-1], -1) if size > 1 else -1
        left = self._most_places
        while place >= 0 and left:
            left -= 1
            nearer = near is not None and abs(place - near) < abs(best_place - near)
            # Whether it is longer than the best one so far shows at the first token that that one does not match.
            longer = best < min(place, size) and (best < 2 or ids[place - 1 - best] == text[-1 - best])
            if longer or nearer or best_room < room:
                length = 2
                most = min(place, size)
                while length < most and ids[place - 1 - length] == text[-1 - length]:
                    length += 1
                behind = len(self.read(place, room)) if room else 0
                if length > best or (length == best and (nearer or behind > best_room)):
                    best_place, best, best_room = place, length, behind
            place = self._before[place]
        if not best and size and (single := self._singles.get(text[-1])) is not None:
            best_place, best = single, 1
        return (best_place, best) if best >= self._min_ngram else (0, 0)

    def _at_end(self) -> tuple[int, int]:
        """The best place for the whole list."""
        if self._seen < len(self._token_ids):
            found = self._extended(()) or self.search(self._token_ids)
            self._seen = len(self._token_ids)
            self._place, self._length = found
        return self._place, self._length

    def _extended(self, tail: Sequence[int]) -> tuple[int, int] | None:
        """The best place of earlier on, if everything since then went on as it does there.

        Then it is the best still: a longer or later match now would have been one before.
        """
        if not self._length:
            return None
        ids, size = self._token_ids, len(self._token_ids)
        more = size + len(tail) - self._seen
        for i in range(more):
            at, there = self._seen + i, self._place + i
            now = ids[at] if at < size else tail[at - size]
            if now != (ids[there] if there < size else tail[there - size]):
                return None
        return self._place + more, self._length + more
