"""The proposers of a session: a small model on a KV slot of its own, and prompt lookup."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from specpair.ngram import NgramIndex
from specpair.v1.common_pb2 import Source
from specpair_runtime.models.runner import ModelRunner
from specpair_runtime.sampling.choice import choose
from specpair_runtime.sampling.history import TokenHistory
from specpair_runtime.sampling.params import GREEDY, SamplingBatch, SamplingParams
from specpair_runtime.sampling.processors import process
from specpair_runtime.sampling.rejection import SparseProbs, propose_by_rejection

__all__ = ["STEP_WIDTHS", "ModelProposer", "NgramProposer", "Proposal", "Proposer", "Turn"]

# Rows of a draft step: one, or up to so many to catch up with what the target committed.
_CATCH_UP = 8
STEP_WIDTHS = (1, _CATCH_UP)


@dataclass(frozen=True)
class Turn:
    """What a turn begins with: the session's tokens, how many of them are prompt, and the target's parameters."""

    token_ids: Sequence[int]
    prompt_length: int
    params: SamplingParams = GREEDY


@dataclass(frozen=True)
class Proposal:
    """Guessed ids; under the rejection rule with the distributions that they were sampled from."""

    token_ids: list[int]
    draft_probs: list[SparseProbs]


class Proposer(Protocol):
    """One session's proposer. It follows the target's tokens and guesses on."""

    source: Source.ValueType
    max_length: int
    """Positions of its KV cache; 0 for no limit."""

    @property
    def length(self) -> int:
        """Tokens that it follows now."""
        ...

    def begin(self, turn: Turn) -> None:
        """Starts a turn."""
        ...

    def follow(self, from_position: int, token_ids: Sequence[int]) -> None:
        """Replaces the tokens from a position on, 0 <= from_position <= length."""
        ...

    def prefill_chunk(self) -> bool:
        """Does a part of what can be done before the first round; whether there is more of it."""
        ...

    def propose(self, max_tokens: int) -> Proposal:
        """Up to `max_tokens` ids that may come next."""
        ...


class ModelProposer:
    """Decodes ahead with a model, with the target's processors, and under the coupled rule with the target's noise.

    `stop_ids` are the ids that the model ends a sequence with.
    """

    source = Source.SOURCE_MODEL

    def __init__(self, runner: ModelRunner, slot: int, prefill_chunk: int, stop_ids: Collection[int] = ()) -> None:
        self.max_length = runner.max_length
        self._runner = runner
        self._slot = slot
        self._prefill_chunk = prefill_chunk
        self._stop_ids = stop_ids
        self._tokens: list[int] = []
        # The ids whose KV is in the slot: at first what was committed, then what was guessed on from there.
        self._cached: list[int] = []
        self._turn = Turn((), 0)
        self._params = SamplingBatch.of([GREEDY], runner.device)
        self._history: TokenHistory | None = None

    @property
    def length(self) -> int:
        """Tokens that it follows now."""
        return len(self._tokens)

    def begin(self, turn: Turn) -> None:
        """Starts a turn; the KV of what it shares with the last one stays."""
        self._turn = turn
        self._params = SamplingBatch.of([turn.params], self._runner.device)
        self._history = None
        self.follow(0, turn.token_ids)

    def follow(self, from_position: int, token_ids: Sequence[int]) -> None:
        """Replaces the tokens from a position on; the KV of guesses that came true stays."""
        self._tokens[from_position:] = token_ids
        agreed = min(from_position, len(self._cached))
        for cached, token in zip(self._cached[agreed:], token_ids, strict=False):
            if cached != token:
                break
            agreed += 1
        # The last token is fed again, because its logits are what is asked for next.
        self._cached = self._cached[: min(agreed, len(self._tokens) - 1)]
        if self._history is not None and self._history.length > from_position:
            self._history = None

    def prefill_chunk(self) -> bool:
        """Feeds a chunk, until only the last few tokens are left; nothing is fed that does not fit the slot."""
        if len(self._tokens) > self.max_length or len(self._tokens) - len(self._cached) <= _CATCH_UP:
            return False
        start = len(self._cached)
        chunk = self._tokens[start : min(start + self._prefill_chunk, len(self._tokens) - 1)]
        self._runner.prefill(self._slot, chunk, start)
        self._cached += chunk
        return True

    def propose(self, max_tokens: int) -> Proposal:
        """Up to `max_tokens` ids, fewer where the slot ends; the forward passes of one round."""
        room = self.max_length - len(self._tokens) + 1
        proposal = Proposal([], [])
        if room <= 0:
            return proposal
        while self.prefill_chunk():
            pass
        pending = self._tokens[len(self._cached) :]
        while len(proposal.token_ids) < min(max_tokens, room):
            logits = self._decode(pending)
            pending = [self._choose(logits, proposal)]
        return proposal

    def _decode(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Feeds ids; the logits behind the last of them, [1, vocabulary]."""
        width = 1 if len(token_ids) == 1 else _CATCH_UP
        start = len(self._cached)
        slots = self._runner.slot_range([self._slot])
        own = self._slot - slots.start
        rows = torch.zeros((len(slots), width), dtype=torch.int64)
        rows[own, : len(token_ids)] = torch.tensor(token_ids)
        starts = torch.full((len(slots),), self._runner.parking)
        starts[own] = start
        logits = self._runner.logits(slots.start, rows, starts, self._runner.bucket(start, width))
        self._cached += token_ids
        return logits[own, len(token_ids) - 1, None]

    def _choose(self, logits: torch.Tensor, proposal: Proposal) -> int:
        """The next guess, added to the proposal."""
        positions = torch.full((1, 1), len(self._cached), device=logits.device)
        if self._turn.params.needs_history:
            guessed = torch.tensor(proposal.token_ids, dtype=torch.int64, device=logits.device)
            logits = self._caught_up_history().apply(logits.float(), guessed, positions[0])
        if self._params.any_rejection:
            scores = process(logits[None].float(), self._params)
            token, sampled_from = propose_by_rejection(scores, positions, self._params)
            proposal.draft_probs.append(sampled_from)
        else:
            token = int(choose(logits[None], positions, self._params))
        proposal.token_ids.append(token)
        return token

    def _caught_up_history(self) -> TokenHistory:
        if self._history is None:
            self._history = TokenHistory(
                self._turn.params,
                self._tokens[: self._turn.prompt_length],
                self._stop_ids,
                self._runner.vocabulary,
                self._runner.device,
            )
        self._history.extend(self._tokens[self._history.length :])
        return self._history


class NgramProposer:
    """Prompt lookup over everything that the session has said."""

    source = Source.SOURCE_NGRAM
    max_length = 0

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._index = NgramIndex()

    @property
    def length(self) -> int:
        """Tokens that it follows now."""
        return len(self._tokens)

    def begin(self, turn: Turn) -> None:
        """Starts a turn."""
        self.follow(0, turn.token_ids)

    def follow(self, from_position: int, token_ids: Sequence[int]) -> None:
        """Replaces the tokens from a position on."""
        if from_position < len(self._tokens):
            # The index only grows; what the target committed is not taken back but by a caller that starts again.
            self._index = NgramIndex(self._tokens[:from_position])
        self._tokens[from_position:] = token_ids
        self._index.extend(token_ids)

    def prefill_chunk(self) -> bool:
        """Nothing to do: the index is kept as tokens come."""
        return False

    def propose(self, max_tokens: int) -> Proposal:
        """What followed the last occurrence of the longest n-gram at the end."""
        return Proposal(self._index.lookup(max_tokens), [])
