"""What has come of a stream, for the one line that the log has of it."""

from __future__ import annotations

from specpair.v1.common_pb2 import FinishReason
from specpair_target.blocks import Answer, Verification

__all__ = ["Tally"]

_PREFIX = "FINISH_REASON_"


class Tally:
    """Counts of one session, over its turns."""

    def __init__(self) -> None:
        self._turns = 1
        self._rounds = self._proposed = self._accepted = self._stale = self._output_tokens = 0
        self._finish_reason: FinishReason.ValueType = FinishReason.FINISH_REASON_UNSPECIFIED

    def turn(self) -> None:
        """A further turn has begun."""
        self._turns += 1
        self._finish_reason = FinishReason.FINISH_REASON_UNSPECIFIED

    def answered(self, proposed: int, answer: Answer) -> None:
        """A block of so many proposed ids has been answered."""
        if not isinstance(answer, Verification):
            self._stale += 1
            return
        self._rounds += 1
        self._proposed += proposed
        # What lies behind the end of the turn was judged and is no part of it.
        self._accepted += min(answer.judgement.accepted, len(answer.commit.token_ids))
        self._output_tokens += len(answer.commit.token_ids)
        self._finish_reason = answer.commit.finish_reason

    def fields(self) -> dict[str, str | int]:
        """As docs/logging.md describes them."""
        found: dict[str, str | int] = {
            "turns": self._turns,
            "rounds": self._rounds,
            "proposed": self._proposed,
            "accepted": self._accepted,
            "stale": self._stale,
            "output_tokens": self._output_tokens,
        }
        if self._finish_reason:
            found["finish"] = FinishReason.Name(self._finish_reason).removeprefix(_PREFIX).lower()
        return found
