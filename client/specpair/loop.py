"""The law of a session: propose, verify, commit. Plain data in and out, no I/O, no clock.

Leviathan, Kalman and Matias 2023, Algorithm 1, cut at its two network borders: the draft answers an `Ask` with a
proposal, the target answers a `Block` with a verdict, and this module says what may be asked, sent and believed. One
round, with the log standing at `length` tokens:

    ask = loop.propose(k)                   at most k ids behind the whole log
    block = loop.verify(proposal)           those of them that can be verified, at base_length = length
    chunk = loop.commit(verdict)            a accepted ids and one of the target's own: length += a + 1

A session's next turn is a `Loop` of its own, which takes over the log as far as the target says that it stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

from specpair.errors import ProtocolError
from specpair.messages import Block, Committed, Proposal, SparseDistribution, Started, Verdict
from specpair.params import AcceptanceRule, SamplingParams
from specpair.results import Chunk, FinishReason, Source, Token

__all__ = ["Ask", "Loop"]

# What a target takes for a distribution: at most so many ids, probabilities that sum to 1 but for rounding.
_MOST_SUPPORT = 64
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Ask:
    """What a proposer is asked in one round."""

    round: int
    token_ids: Sequence[int]
    """The whole log, to be read only: it grows with the session. The proposal continues it."""
    max_tokens: int
    """Most ids to propose; 0 asks for nothing."""


class Loop:
    """One turn of a session: the log of committed tokens, and which block is on its way.

    `vocabulary_size` is the real one, without padding; None if nothing from outside the vocabulary can be proposed.
    `last` is the session's last turn.
    """

    def __init__(
        self,
        started: Started,
        params: SamplingParams,
        *,
        vocabulary_size: int | None = None,
        last: Loop | None = None,
    ) -> None:
        kept = last.token_ids[: started.cached_tokens] if last is not None else []
        self.token_ids: list[int] = [*kept, *started.prompt_token_ids]
        """The whole session. Position i holds token_ids[i]; the next token gets position len(token_ids)."""
        self.prompt_length = len(self.token_ids)
        self.tokens: list[Token] = []
        """The output of this turn, with provenance."""
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None
        self.round: int = last.round if last is not None else 0
        """Of the session: no two of its blocks have the same."""
        self.applied = 0
        """Steps of the target that moved the session on."""
        self.stale = 0
        self.proposed = 0
        self.accepted = 0
        self._max_block_tokens = started.max_block_tokens
        self._max_length = started.max_length
        self._max_new_tokens = params.max_new_tokens
        self._rejection = params.rule == AcceptanceRule.REJECTION
        self._vocabulary_size = vocabulary_size
        self._block: Block | None = None
        self._stale_rounds = 0
        if (started.cached_tokens, started.length) != (len(kept), self.prompt_length) or not started.prompt_token_ids:
            raise ProtocolError(
                f"the turn starts at length {started.length} with {started.cached_tokens} tokens that stay; "
                f"here are {len(kept)} of those and {len(started.prompt_token_ids)} new ones"
            )

    @property
    def waiting(self) -> bool:
        """Whether a block is on its way."""
        return self._block is not None

    @property
    def limit(self) -> int:
        """Most ids that are worth proposing now.

        The target adds a token of its own to every block, so the last of max_new_tokens need not be proposed; and a
        proposed id needs a position in the cache.
        """
        room = self._max_block_tokens
        if self._max_length:
            room = min(room, self._max_length - len(self.token_ids))
        if self._max_new_tokens is not None:
            room = min(room, self._max_new_tokens - len(self.tokens) - 1)
        return max(room, 0)

    def propose(self, draft_length: int) -> Ask:
        """Opens a round: what to ask the proposer for."""
        self.round += 1
        return Ask(self.round, self.token_ids, min(draft_length, self.limit))

    def verify(self, ask: Ask, proposal: Proposal | None) -> Block:
        """The block for the target: the part of the proposal that answers the ask, which may be none of it."""
        token_ids, draft_probs = self._usable(ask, proposal)
        source = Source.TARGET
        if proposal is not None and token_ids:  # only the target itself may call a token the target's
            source = Source.MODEL if proposal.source is Source.TARGET else proposal.source
        self._block = Block(
            round=ask.round,
            base_length=len(self.token_ids),
            last_token_id=self.token_ids[-1],
            token_ids=token_ids,
            source=source,
            draft_probs=draft_probs,
        )
        return self._block

    def commit(self, verdict: Verdict) -> Chunk:
        """What the verdict adds to the output: nothing if it is stale.

        Raises ProtocolError for a verdict that contradicts the state: nothing can be believed after it.
        """
        block = self._block
        if verdict.stale:
            self._drop(block, verdict)
            return Chunk((), "")
        if block is None or verdict.round != block.round:
            raise ProtocolError(f"the target judged round {verdict.round}, which is not under way")
        committed = verdict.committed
        _check(verdict.base_length == block.base_length, verdict, "does not stand where the block does")
        _check(verdict.accepted <= len(block.token_ids), verdict, "accepts more than was proposed")
        judged = verdict.accepted + (0 if committed.finish_reason else 1)
        _check(judged <= len(committed.token_ids) <= verdict.accepted + 1, verdict, "commits a wrong number of ids")
        accepted = block.token_ids[: verdict.accepted]
        _check(committed.token_ids[: verdict.accepted] == accepted, verdict, "accepts ids that were not proposed")
        self._block = None
        self._stale_rounds = 0
        self.proposed += len(block.token_ids)
        self.accepted += verdict.accepted
        return self.append(committed, [block.source] * verdict.accepted)

    def append(self, committed: Committed, sources: Sequence[Source] = ()) -> Chunk:
        """Adds tokens to the log: the first with the given sources, the others as the target's own."""
        if self.finish_reason is not None:
            raise ProtocolError("the target went on after the end")
        texts = _split(committed)
        if committed.logprobs and len(committed.logprobs) != len(texts):
            raise ProtocolError("the target sent log probabilities for another number of tokens")
        provenance = [*sources, *[Source.TARGET] * (len(texts) - len(sources))]
        logprobs = committed.logprobs or (None,) * len(texts)
        tokens = tuple(map(Token, committed.token_ids, texts, provenance, logprobs))
        self.applied += 1
        self.tokens.extend(tokens)
        self.token_ids.extend(committed.token_ids)
        self.finish_reason = committed.finish_reason
        self.stop_string = committed.stop_string or None
        return Chunk(tokens, committed.text_delta, self.finish_reason, self.stop_string)

    def _usable(self, ask: Ask, proposal: Proposal | None) -> tuple[tuple[int, ...], tuple[SparseDistribution, ...]]:
        """Ids and probabilities that can be verified. A draft may say anything; it costs speed, never an error."""
        if proposal is None or (proposal.round, proposal.base_length) != (ask.round, len(self.token_ids)):
            return (), ()
        token_ids = proposal.token_ids[: ask.max_tokens]
        if (size := self._vocabulary_size) is not None:
            token_ids = tuple(takewhile(size.__gt__, token_ids))
        if not self._rejection or not proposal.draft_probs:
            # Without draft probabilities the rejection rule takes the proposer to be certain of what it proposes.
            return token_ids, ()
        pairs = list(takewhile(lambda pair: self._plausible(*pair), zip(token_ids, proposal.draft_probs, strict=False)))
        return tuple(id_ for id_, _ in pairs), tuple(distribution for _, distribution in pairs)

    def _plausible(self, token_id: int, sampled_from: SparseDistribution) -> bool:
        """Whether the target will take it that `token_id` was sampled from a distribution."""
        ids, probs = sampled_from.token_ids, sampled_from.probs
        if not len(ids) == len(probs) == len(set(ids)) <= _MOST_SUPPORT:
            return False
        if (size := self._vocabulary_size) is not None and not all(map(size.__gt__, ids)):
            return False
        if not all(0.0 <= prob <= 1.0 + _TOLERANCE for prob in probs) or abs(sum(probs) - 1.0) > _TOLERANCE:
            return False
        return dict(zip(ids, probs, strict=True)).get(token_id, 0.0) > 0.0

    def _drop(self, block: Block | None, verdict: Verdict) -> None:
        """A block that the target did not apply: harmless as long as both sides agree on the length."""
        self.stale += 1
        if block is None or verdict.round != block.round:
            return  # a duplicate of an earlier block, made on the way
        self._block = None
        self._stale_rounds += 1
        _check(verdict.base_length == len(self.token_ids), verdict, "stands at another length")
        _check(self._stale_rounds == 1, verdict, "is stale for the second time in a row")


def _split(committed: Committed) -> list[str]:
    """The text that each token added."""
    text, lengths = committed.text_delta, committed.text_lengths
    if len(lengths) != len(committed.token_ids) or sum(lengths) != len(text):
        raise ProtocolError("the target's text does not divide among its tokens")
    return [text[end - length : end] for end, length in zip(accumulate(lengths), lengths, strict=True)]


def _check(holds: bool, verdict: Verdict, fault: str) -> None:
    if not holds:
        raise ProtocolError(f"the target's verdict on round {verdict.round} {fault}")
