"""The law of a session: propose, verify, commit. Plain data in and out, no I/O, no clock.

Leviathan, Kalman and Matias 2023, Algorithm 1, cut at its two network borders: the draft answers an `Ask` with a
proposal, the target answers a `Block` with a verdict, and this module says what may be asked, sent and believed. One
round, with the log standing at `length` tokens:

    ask = loop.propose(k)                   at most k ids behind the whole log
    block = loop.verify(ask, proposal)      those of them that can be verified, at base_length = length
    chunk = loop.commit(verdict)            a accepted ids and one of the target's own: length += a + 1

Further blocks may go out before the verdict. Then the proposer is asked for one id more, which is taken as a guess of
the target's own token, and the next ask continues what the log will be if all of it comes true. The target judges in
order and by what a block continues, so that a wrong assumption costs the blocks behind it and nothing else: they are
dropped here, and their stale verdicts, which are sure to come, are passed over. Under the rejection rule nothing is
assumed: the draft draws from noise of its own there, and its guess of the target's draw would hardly ever be right.

A plain step needs no assumption: it brings one token, whatever that is. So while nothing is going to be proposed
further steps may go out behind it, at lengths that are known before the tokens are.

A session's next turn is a `Loop` of its own, which takes over the log as far as the target says that it stays. A turn
whose stream broke off resumes on another one, behind the committed tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile

from specpair.errors import ProtocolError
from specpair.messages import Block, Committed, Proposal, SparseDistribution, Started, Verdict
from specpair.params import AcceptanceRule, SamplingParams
from specpair.results import Chunk, FinishReason, Source, Token

__all__ = ["Ask", "Loop", "Sent"]

# What a target takes for a distribution: at most so many ids, probabilities that sum to 1 but for rounding.
_MOST_SUPPORT = 64
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Ask:
    """What a proposer is asked in one round."""

    round: int
    token_ids: Sequence[int]
    """The whole log, to be read only, with what is assumed to become of blocks under way. The proposal continues it."""
    max_tokens: int
    """Most ids that the block may have. How many of them pay is the proposer's to decide; none make a plain step."""
    committed: int = 0
    """Tokens below this position never change. Those from it on are assumed: the next ask may have others there."""
    ahead: int = 0
    """Blocks that may follow before the verdict on this one. Above 0 the last id that is proposed becomes the guess of
    the target's own token, and is not part of the block."""

    @property
    def most(self) -> int:
        """Most ids that are of use: those of a block, and the guess."""
        return self.max_tokens + (self.ahead > 0)


@dataclass(frozen=True, slots=True)
class Sent:
    """A block under way and where it came from."""

    block: Block
    proposal: Proposal | None
    guess: int | None = None
    """The id that is assumed to be the target's own; None if nothing is assumed."""

    def comes_true(self, committed: Committed) -> bool:
        """Whether what was assumed of the block is what the target did."""
        return self.guess is not None and committed.token_ids == (*self.block.token_ids, self.guess)


class Loop:
    """One turn of a session: the log of committed tokens, and which blocks are on their way.

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
        self.dropped = 0
        """Blocks that continued what did not come true."""
        self.proposed = 0
        self.accepted = 0
        self._max_block_tokens = started.max_block_tokens
        self._max_length = started.max_length
        self._max_new_tokens = params.max_new_tokens
        self._rejection = params.rule == AcceptanceRule.REJECTION
        self._vocabulary_size = vocabulary_size
        # The log with what is assumed of the blocks under way. Another list after everything that did not come true, so
        # that an ask never sees the ground move.
        self._assumed = list(self.token_ids)
        self._sent: deque[Sent] = deque()
        self._doomed: set[int] = set()
        self._stale_rounds = 0
        if (started.cached_tokens, started.length) != (len(kept), self.prompt_length) or not started.prompt_token_ids:
            raise ProtocolError(
                f"the turn starts at length {started.length} with {started.cached_tokens} tokens that stay; "
                f"here are {len(kept)} of those and {len(started.prompt_token_ids)} new ones"
            )

    @property
    def waiting(self) -> int:
        """How many blocks are on their way that may come true."""
        return len(self._sent)

    @property
    def under_way(self) -> Sent | None:
        """The oldest of them, which the next verdict will be on."""
        return self._sent[0] if self._sent else None

    @property
    def open(self) -> bool:
        """Whether a block may go out: nothing is under way, or what becomes of it is assumed and is not the end."""
        if not self._sent:
            return self.finish_reason is None
        if self._sent[-1].guess is None or (self._max_length and len(self._assumed) >= self._max_length):
            return False
        return self._max_new_tokens is None or self._new_tokens < self._max_new_tokens

    @property
    def steady(self) -> bool:
        """Whether a plain step may go out behind the blocks under way: the last of them is one, and not the end."""
        if not self._sent or self._sent[-1].block.token_ids or self._sent[-1].guess is not None:
            return False
        length = self._sent[-1].block.base_length + 1
        if self._max_length and length >= self._max_length:
            return False
        return self._max_new_tokens is None or length - self.prompt_length < self._max_new_tokens

    @property
    def limit(self) -> int:
        """Most ids that are worth proposing now.

        The target adds a token of its own to every block, so the last of max_new_tokens need not be proposed; and a
        proposed id needs a position in the cache.
        """
        room = self._max_block_tokens
        if self._max_length:
            room = min(room, self._max_length - len(self._assumed))
        if self._max_new_tokens is not None:
            room = min(room, self._max_new_tokens - self._new_tokens - 1)
        return max(room, 0)

    @property
    def _new_tokens(self) -> int:
        """Tokens of this turn's output, with what is assumed."""
        return len(self._assumed) - self.prompt_length

    def propose(self, most: int | None = None, *, ahead: int = 0) -> Ask:
        """Opens a round: what to ask the proposer for. `most` ids at most if given; further blocks may follow it."""
        self.round += 1
        limit = self.limit
        if self._rejection or limit == 0:
            ahead = 0
        return Ask(self.round, self._assumed, limit if most is None else min(most, limit), len(self.token_ids), ahead)

    def stands_at(self, started: Started) -> bool:
        """Whether a target that was told all committed tokens stands where the log does."""
        prompt = tuple(self.token_ids[: self.prompt_length])
        return (started.cached_tokens, started.length, started.prompt_token_ids) == (0, len(self.token_ids), prompt)

    def resume(self, started: Started) -> None:
        """Goes on behind the committed tokens on another stream, at which nothing is under way.

        Raises ProtocolError if that does not stand where the log does.
        """
        if not self.stands_at(started):
            raise ProtocolError(f"the turn goes on at length {started.length}; here it is {len(self.token_ids)}")
        self._max_block_tokens = started.max_block_tokens
        self._max_length = started.max_length
        self._drop()
        self._doomed.clear()  # their verdicts will not come any more
        self._stale_rounds = 0

    def stands(self, ask: Ask) -> bool:
        """Whether an ask still continues what there is to continue."""
        return ask.token_ids is self._assumed

    def verify(self, ask: Ask, proposal: Proposal | None) -> Block:
        """The block for the target: the part of the proposal that answers the ask, which may be none of it."""
        token_ids, draft_probs = self._usable(ask, proposal)
        guess = None
        if ask.ahead and token_ids:
            *block_ids, guess = token_ids
            token_ids = tuple(block_ids)
        source = Source.TARGET
        if proposal is not None and token_ids:  # only the target itself may call a token the target's
            source = Source.MODEL if proposal.source is Source.TARGET else proposal.source
        block = Block(
            round=ask.round,
            base_length=len(self._assumed),
            last_token_id=self._assumed[-1],
            token_ids=token_ids,
            source=source,
            draft_probs=draft_probs,
        )
        self._sent.append(Sent(block, proposal, guess))
        if guess is not None:
            self._assumed += (*token_ids, guess)
        return block

    def steps(self, most: int) -> Block:
        """One to `most` plain steps behind one that is under way, in one block, as long as the turn may last."""
        length = self._sent[-1].block.base_length + 1
        if self._max_length:
            most = min(most, self._max_length - length)
        if self._max_new_tokens is not None:
            most = min(most, self.prompt_length + self._max_new_tokens - length)
        blocks = [Block(self.round + 1 + i, length + i, None, (), Source.TARGET) for i in range(max(most, 1))]
        self.round += len(blocks)
        self._sent.extend(Sent(block, None) for block in blocks)
        return replace(blocks[0], more_steps=len(blocks) - 1)

    def commit(self, verdict: Verdict) -> Chunk:
        """What the verdict adds to the output: nothing if it is stale.

        Raises ProtocolError for a verdict that contradicts the state: nothing can be believed after it.
        """
        sent = self.under_way
        if verdict.stale:
            self._pass_over(sent, verdict)
            return Chunk((), "")
        if sent is None or verdict.round != sent.block.round:
            raise ProtocolError(f"the target judged round {verdict.round}, which is not under way")
        block, committed = sent.block, verdict.committed
        _check(verdict.base_length == block.base_length, verdict, "does not stand where the block does")
        _check(verdict.accepted <= len(block.token_ids), verdict, "accepts more than was proposed")
        judged = verdict.accepted + (0 if committed.finish_reason else 1)
        _check(judged <= len(committed.token_ids) <= verdict.accepted + 1, verdict, "commits a wrong number of ids")
        accepted = block.token_ids[: verdict.accepted]
        _check(committed.token_ids[: verdict.accepted] == accepted, verdict, "accepts ids that were not proposed")
        chunk = self.append(committed, [block.source] * verdict.accepted)
        self._sent.popleft()
        self._stale_rounds = 0
        self.proposed += len(block.token_ids)
        self.accepted += verdict.accepted
        if self.finish_reason is not None or not (sent.guess is None or sent.comes_true(committed)):
            self._drop()
        elif sent.guess is None:
            self._assumed += committed.token_ids
        return chunk

    def append(self, committed: Committed, sources: Sequence[Source] = ()) -> Chunk:
        """Adds tokens to the log: the first with the given sources, the others as the target's own."""
        if self.finish_reason is not None:
            raise ProtocolError("the target went on after the end")
        if committed.base_length not in (None, len(self.token_ids)):
            raise ProtocolError(f"the target is at {committed.base_length} tokens, not at {len(self.token_ids)}")
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
        if proposal is None or (proposal.round, proposal.base_length) != (ask.round, len(self._assumed)):
            return (), ()
        token_ids = proposal.token_ids[: ask.most]
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

    def _pass_over(self, sent: Sent | None, verdict: Verdict) -> None:
        """A block that the target did not apply: harmless as long as both sides agree on the length."""
        if verdict.round in self._doomed:
            self._doomed.remove(verdict.round)
            return
        self.stale += 1
        if sent is None or verdict.round != sent.block.round:
            return  # a duplicate of an earlier block, made on the way
        self._sent.popleft()
        self._drop()
        self._stale_rounds += 1
        _check(verdict.base_length == len(self.token_ids), verdict, "stands at another length")
        _check(self._stale_rounds == 1, verdict, "is stale for the second time in a row")

    def _drop(self) -> None:
        """What was assumed has not come true: nothing under way can, and the log is what is committed."""
        self._doomed.update(sent.block.round for sent in self._sent)
        self.dropped += len(self._sent)
        self._sent.clear()
        self._assumed = list(self.token_ids)


def _split(committed: Committed) -> list[str]:
    """The text that each token added."""
    text, lengths = committed.text_delta, committed.text_lengths
    if len(lengths) != len(committed.token_ids) or sum(lengths) != len(text):
        raise ProtocolError("the target's text does not divide among its tokens")
    return [text[end - length : end] for end, length in zip(accumulate(lengths), lengths, strict=True)]


def _check(holds: bool, verdict: Verdict, fault: str) -> None:
    if not holds:
        raise ProtocolError(f"the target's verdict on round {verdict.round} {fault}")
