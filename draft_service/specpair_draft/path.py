"""What one session's draft has decoded, beside what the target has committed."""

from __future__ import annotations

from collections.abc import Sequence

from specpair_runtime.sampling.rejection import SparseProbs

__all__ = ["Path"]

_NOWHERE = 1 << 62


class Path:
    """The tokens that the target committed, the ids whose KV is in the slot, and the guesses behind them.

    `tokens` are the target's. `ids` are the path: as long as the slot lacks some of the tokens, those that it holds,
    and afterwards all of them and the draft's guesses. The KV of the first `fed` ids is in the slot, which is all of
    them but the last guess: that one is fed when another is wanted.

    A guess depends on what stands before it and on the turn's parameters alone, because noise goes by position, a
    rejection draft's own included (`Stream.DRAFT`). So it is good for as long as the target's tokens agree with the
    path, whenever it was made.
    """

    def __init__(self, max_length: int) -> None:
        """`max_length` positions are in the slot; the last guess needs none."""
        self.tokens: list[int] = []
        self.ids: list[int] = []
        self.fed = 0
        self._max_length = max_length
        # The guesses are the ids from here on; the other two lists have an entry for each of them, or are not kept.
        self._first_guess = _NOWHERE
        self._probs: list[SparseProbs] = []
        self._confidence: list[float] = []

    @property
    def end(self) -> int:
        """The length that the path cannot exceed."""
        return self._max_length + 1

    @property
    def fits(self) -> bool:
        """Whether all tokens fit into the slot, so that something can be guessed."""
        return len(self.tokens) <= self._max_length

    @property
    def pending(self) -> list[int]:
        """The ids to feed before the next guess, at least one."""
        return (self.ids if len(self.ids) > len(self.tokens) else self.tokens)[self.fed :]

    @property
    def backlog(self) -> int:
        """How many those are."""
        return max(len(self.ids), len(self.tokens)) - self.fed

    @property
    def guesses(self) -> list[int]:
        """The guesses behind the tokens."""
        return self.ids[len(self.tokens) :]

    @property
    def confident(self) -> bool:
        """Whether the confidence of every guess behind the tokens is known."""
        return len(self.ids) <= len(self.tokens) or len(self._confidence) == len(self.ids) - self._first_guess

    def follow(self, from_position: int, token_ids: Sequence[int]) -> None:
        """Replaces the tokens from a position on; the KV of what agrees stays, and so do guesses behind it."""
        self.tokens[from_position:] = token_ids
        agreed = min(from_position, len(self.ids))
        for known, token in zip(self.ids[agreed:], token_ids, strict=False):
            if known != token:
                break
            agreed += 1
        if agreed < len(self.tokens) or not self._first_guess <= agreed < len(self.ids):
            self._cut(agreed)

    def forget_guesses(self) -> None:
        """Keeps what the target committed."""
        self._cut(min(len(self.ids), len(self.tokens)))

    def feed(self, count: int) -> None:
        """The KV of the next `count` tokens is in the slot now, as that of all before them."""
        self.ids += self.tokens[self.fed : self.fed + count]
        self.fed += count

    def grow(self, guesses: Sequence[int], confidence: Sequence[float], probs: Sequence[SparseProbs]) -> None:
        """Adds guesses; the KV of what was pending and of all guesses but the last is in the slot now."""
        if len(self.ids) <= len(self.tokens):
            self.ids += self.tokens[len(self.ids) :]
            self._first_guess = len(self.ids)
        self.ids += guesses
        self._confidence += confidence
        self._probs += probs
        self.fed = len(self.ids) - 1

    def probs(self, start: int, stop: int) -> list[SparseProbs]:
        """What the guesses at these positions were sampled from; none if that was not kept."""
        return self._probs[start - self._first_guess : stop - self._first_guess]

    def confidence(self, start: int, stop: int) -> list[float]:
        """The draft's probabilities of the guesses at these positions; none if they were not kept."""
        return self._confidence[start - self._first_guess : stop - self._first_guess]

    def _cut(self, agreed: int) -> None:
        """Keeps the KV of the first `agreed` ids, which are tokens."""
        # The last token is fed again, because its logits are what is asked for next.
        self.fed = min(agreed, self.fed, len(self.tokens) - 1)
        del self.ids[self.fed :]
        self._first_guess = _NOWHERE
        self._probs, self._confidence = [], []
