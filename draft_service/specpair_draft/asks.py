"""What a session's proposer is told and asked, and what it answers, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specpair.errors import SpecpairError
from specpair_runtime.sampling.params import GREEDY, SamplingParams
from specpair_runtime.sampling.rejection import SparseProbs

__all__ = ["Ask", "Deliver", "Proposal", "Timed", "Turn"]


@dataclass(frozen=True)
class Turn:
    """What a turn begins with: the session's tokens, how many of them are prompt, and the target's parameters."""

    token_ids: Sequence[int]
    prompt_length: int
    params: SamplingParams = GREEDY


@dataclass(frozen=True)
class Ask:
    """One round: what the target committed from a position on, and what to propose behind it.

    That is `proposals` times up to `max_tokens` ids, each proposal going on where the one before it ended. With a
    `min_confidence` above 0 a proposal ends early, before its probability falls below that.
    """

    from_position: int
    token_ids: Sequence[int]
    max_tokens: int
    proposals: int = 1
    min_confidence: float = 0.0

    @property
    def base_length(self) -> int:
        """The session's tokens from now on."""
        return self.from_position + len(self.token_ids)


@dataclass(frozen=True)
class Proposal:
    """Guessed ids; under the rejection rule with the distributions that they were sampled from.

    `confidence` is the draft's own probability of each id, where the ask had a least one.
    """

    token_ids: list[int]
    draft_probs: Sequence[SparseProbs] = ()
    confidence: Sequence[float] = ()


@dataclass(frozen=True)
class Timed:
    """Proposal number `index` of an ask, continuing `base_length` tokens.

    `draft_us` is the time of the steps that it took since the ask came, or since the proposal before it was ready;
    `queue_us` the rest of that time, a prompt's prefill included. What was ready has taken no `draft_us`.
    """

    index: int
    base_length: int
    proposal: Proposal
    queue_us: int
    draft_us: int


Deliver = Callable[[Timed | SpecpairError], None]
"""Takes the proposals of an ask one by one, or why there are none. Must be quick: the engine waits for it."""
