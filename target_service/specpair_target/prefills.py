"""Whose prompt is prefilled next, and how much of it between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from specpair_target.sessions import Session

__all__ = ["Prefills", "StepBudget"]


@dataclass(frozen=True)
class _Prompt:
    session: Session
    due: int


class Prefills:
    """Prompts that wait, in chunks of `chunk` tokens. The prompt alone decides where they end: bits depend on it.

    The prompt goes first whose last chunk would be due first, had it been alone since it came: at the number of chunks
    computed until it came plus its own. So a short prompt passes a long one, which in turn is passed only by what comes
    before as many chunks were computed as it has itself. Nobody waits without end, and nobody waits for the whole of
    something that came later.
    """

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self._prompts: list[_Prompt] = []
        self._computed = 0

    def add(self, session: Session) -> None:
        """Takes a session that begins a turn."""
        chunks = -(-(session.prompt_length - 1 - session.kv_length) // self.chunk)
        self._prompts.append(_Prompt(session, self._computed + chunks))

    def first(self) -> Session | None:
        """The session whose chunk is next; None when no prompt waits. Forgets those that are done, closed or failed."""
        self._prompts = [prompt for prompt in self._prompts if _waits(prompt.session)]
        return min(self._prompts, key=lambda prompt: prompt.due).session if self._prompts else None

    def computed(self) -> None:
        """A chunk has been computed."""
        self._computed += 1


def _waits(session: Session) -> bool:
    return not (session.prefilled or session.closed or session.failure is not None)


class StepBudget:
    """How many rows of prefill a step makes room for.

    Each step may go with `step_tokens` rows, its own included; what it leaves is saved up until a chunk can be paid.
    Steps that take it all leave a quarter of it all the same, so that prompts never starve.
    """

    def __init__(self, step_tokens: int, chunk: int) -> None:
        self._step_tokens = step_tokens
        self._chunk = chunk
        self._credit = 0

    @property
    def allows_chunk(self) -> bool:
        """Whether a chunk goes before the next step."""
        return self._credit >= self._chunk

    def stepped(self, rows: int) -> None:
        """A step of so many rows has run."""
        self._credit += max(self._step_tokens - rows, -(-self._step_tokens // 4))

    def spend(self) -> None:
        """A chunk has run, be it for credit or because nobody was ready for a step."""
        self._credit = max(0, self._credit - self._chunk)

    def reset(self) -> None:
        """No prompt waits: credit is not saved up for those to come."""
        self._credit = 0
