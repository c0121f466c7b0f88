"""Where a turn looks up what may come next: in its own text, in a corpus, in a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specpair.corpus import Corpus
from specpair.ngram import Match, NgramIndex
from specpair.prediction import PredictedOutput
from specpair.results import Source

__all__ = ["Found", "Lookup"]

# Tokens at the end of a log that a corpus looks at: what is found again for so long is as good as certain.
_CONTEXT = 64
# The longest match of each class. Longer ones than all of these are one class: they come true about equally often.
_CLASSES = (0, 1, 2, 3, 4, 6, 9, 15, 31)


@dataclass(frozen=True, slots=True)
class Found:
    """Ids that may come next, and what says so."""

    token_ids: tuple[int, ...]
    source: Source
    kind: tuple[str, int]
    """The text that it was found in and the class of the match's length: what came of the others of its kind tells what
    to expect of it."""


class Lookup:
    """The texts that one turn looks up in."""

    def __init__(self, corpus: Corpus | None = None, prediction: PredictedOutput | None = None) -> None:
        self._own = NgramIndex(min_ngram=1)
        self._corpus = corpus
        self._prediction = prediction

    def find(self, log: Sequence[int], committed: int, max_tokens: int) -> list[Found]:
        """What each text says behind a log, of which the first `committed` tokens are never taken back.

        The corpus is heard where its match is longer than the session's own. Texts with nothing to say are left out.
        """
        self._own.extend(log[len(self._own) : committed])
        own = self._own.find(max_tokens, log[committed:])
        found = [_found("own", Source.NGRAM, own)]
        if self._corpus is not None:
            match = self._corpus.find(log[-_CONTEXT:], max_tokens)
            if match.length > own.length:
                found.append(_found("corpus", Source.PREDICTION, match))
        if self._prediction is not None:
            match = self._prediction.find(log, committed, max_tokens)
            found.append(_found("prediction", Source.PREDICTION, match))
        return [one for one in found if one.token_ids]


def _found(text: str, source: Source, match: Match) -> Found:
    length = next((i for i, longest in enumerate(_CLASSES) if match.length <= longest), len(_CLASSES))
    return Found(match.token_ids, source, (text, length))
