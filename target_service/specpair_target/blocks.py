"""Blocks, and what the engine answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specpair_runtime.sampling.rejection import SparseProbs
from specpair_target.sessions import Commit, Session
from specpair_target.verifier import Judgement

__all__ = ["Answer", "Block", "Stale", "Verification"]


@dataclass(frozen=True)
class Block:
    """A proposal, at most width - 1 ids, and the state of the session that it continues.

    `base_length` None takes the session as it is when the block's turn comes, `last_token_id` None whatever its last
    token is. `draft_probs` are what the ids were sampled from, for the rejection rule.
    """

    token_ids: Sequence[int] = ()
    base_length: int | None = None
    last_token_id: int | None = None
    draft_probs: Sequence[SparseProbs] = ()

    def continues(self, session: Session) -> bool:
        """Whether the session is in the state that this block was made for; no block continues a turn that ended."""
        if session.finish_reason or self.base_length not in (None, session.length):
            return False
        return self.last_token_id in (None, session.tokens[-1])


@dataclass(frozen=True)
class Verification:
    """The answer to a block that was applied: what was said to it, what the session committed, how it went.

    `base_length` is the session's length before the commit, `queue_us` the time from the block's arrival to its step.
    """

    judgement: Judgement
    commit: Commit
    base_length: int
    queue_us: int
    batch_sessions: int


@dataclass(frozen=True)
class Stale:
    """The answer to a block that does not continue the session, which has `length` tokens at that moment."""

    length: int


Answer = Verification | Stale
