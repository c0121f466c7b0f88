"""Texts to look up in beside the session's own: earlier outputs, and whatever else a caller adds."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from specpair.errors import InvalidRequestError
from specpair.ngram import Match, NgramIndex

__all__ = ["Corpus"]


class Corpus:
    """Earlier outputs and other texts, as token ids of the target, in which generations look up what may come next.

    A client that is given one adds every finished output to it. It is the one thing that a generation leaves behind for
    another: whoever may use the client gets proposals from what others had it generate. What is proposed shows in the
    speed, and in nothing else; where even that must not tell callers of each other, they need a corpus each, or none.

    At most `max_tokens` tokens are kept, and of those that were added last at least half as many: the older half goes
    when the newer one is full. A token takes about 50 bytes. Several clients and threads may use one corpus.
    """

    def __init__(self, texts: Iterable[Sequence[int]] = (), *, max_tokens: int = 200_000) -> None:
        if max_tokens < 4:
            raise InvalidRequestError("must be at least 4", field="max_tokens")
        self._half = max_tokens // 2
        self._newer, self._older = _index(), _index()
        self._lock = threading.Lock()
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        """Tokens that are kept, and one more for each border between two texts."""
        return len(self._newer) + len(self._older)

    def add(self, token_ids: Sequence[int]) -> None:
        """Adds a text; of one that is longer than half of the corpus, its end."""
        text = token_ids[-self._half :]
        with self._lock:
            if len(self._newer) + 1 + len(text) > self._half:
                self._older, self._newer = self._newer, _index()
            self._newer.cut()
            self._newer.extend(text)

    def find(self, text: Sequence[int], max_tokens: int) -> Match:
        """What followed the longest match of a text's end, the latest of equally long ones."""
        with self._lock:
            newer = self._newer.find_behind(text, max_tokens)
            older = self._older.find_behind(text, max_tokens)
        return older if older.length > newer.length else newer


def _index() -> NgramIndex:
    # Outputs are often alike: a pair may stand at the same place in each of thousands.
    return NgramIndex(most_places=256)
