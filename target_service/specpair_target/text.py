"""Text at the border of the token world: prompts in, deltas out, stop strings in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream", "TextUpdate"]

# Tokens of context that a tokenizer may need to render the next one, as with spaces between words.
_CONTEXT = 6
_INCOMPLETE = "\ufffd"
# Bytes of a character in UTF-8, each of which may be a token of its own.
_LONGEST_CHARACTER = 4


@dataclass(frozen=True)
class TextUpdate:
    """What one token added: `released` text, and the stop string that it completed, "" if none."""

    released: str
    stop_string: str = ""


class TextStream:
    """Turns the tokens of one turn into text, holding back what may still become a stop string or a character.

    Everything depends on the tokens alone, not on how they came in blocks: a resumed session releases the same text
    at the same token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], stop_strings: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._ids = self._context(prompt_ids)
        # The text of ids[_prefix:] begins with _out characters that are out already; that of ids[_prefix:_read] is
        # complete and gives the context for the ids behind it. A prompt may end in half a character, which the first
        # tokens complete.
        self._prefix = 0
        self._read = len(self._ids)
        self._out = len(self._decode(self._ids).rstrip(_INCOMPLETE))
        self._held = ""

    def push(self, token_id: int, *, search: bool = True) -> TextUpdate:
        """Takes one token; looks for stop strings in what it adds, if it is to `search`.

        After an update with a stop string nothing more is taken.
        """
        self._ids.append(token_id)
        self._held += self._decoded(flush=False)
        found = self._first_stop() if search else None
        if found is not None:
            start, stop_string = found
            released, self._held = self._held[:start], ""
            # Whatever else the token says stands behind the end.
            self._prefix = len(self._ids)
            return TextUpdate(released, stop_string)
        keep = self._possible_stop()
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return TextUpdate(released)

    def flush(self) -> str:
        """The text held back, at the end of a turn."""
        released, self._held = self._held + self._decoded(flush=True), ""
        return released

    def _decoded(self, *, flush: bool) -> str:
        text = self._decode(self._ids[self._prefix :])
        # Half a character decodes to replacement characters, until the next token completes it.
        whole = text if flush else text.rstrip(_INCOMPLETE)
        new = whole[self._out :]
        if new:
            self._out = len(whole)
        if new and len(whole) == len(text):
            self._prefix, self._read = self._read, len(self._ids)
            self._out = len(self._decode(self._ids[self._prefix :]))
        return new

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The end of a prompt, from the beginning of a character on."""
        start = max(0, len(prompt_ids) - _CONTEXT)
        for further in range(_LONGEST_CHARACTER):
            context = list(prompt_ids[max(0, start - further) :])
            if not self._decode(context).startswith(_INCOMPLETE):
                return context
        return list(prompt_ids[start:])

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _first_stop(self) -> tuple[int, str] | None:
        found = [(self._held.find(stop), stop) for stop in self._stop_strings]
        return min(((start, stop) for start, stop in found if start >= 0), default=None)

    def _possible_stop(self) -> int:
        """Characters at the end of the held text that could be the beginning of a stop string."""
        longest = 0
        for stop in self._stop_strings:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
