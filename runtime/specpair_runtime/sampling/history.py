"""Processors that depend on what a session said before, with a history of its own for every position of a block."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from specpair_runtime.sampling.params import SamplingParams

__all__ = ["TokenHistory", "apply_histories"]


class TokenHistory:
    """What one session's penalties, logit bias and minimum length need to know, on the device.

    `suppressed` are the ids that end a turn, which are not chosen before `min_new_tokens`. `length` counts the
    committed tokens that the history holds.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        suppressed: Collection[int],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        self.params = params
        self.length = len(prompt)
        self._vocabulary = vocabulary
        self._first_free_position = len(prompt) + params.min_new_tokens
        self._suppressed = torch.tensor(sorted(suppressed), dtype=torch.int64, device=device)
        self._in_prompt = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._in_prompt[torch.tensor(list(prompt), dtype=torch.int64, device=device)] = True
        self._counts = torch.zeros(vocabulary, dtype=torch.int32, device=device)
        self._bias = torch.zeros(vocabulary, dtype=torch.float32, device=device)
        for token_id, bias in params.logit_bias:
            self._bias[token_id] = bias

    def extend(self, token_ids: Sequence[int]) -> None:
        """Adds committed tokens of the output."""
        ids = torch.tensor(list(token_ids), dtype=torch.int64, device=self._counts.device)
        self._counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        self.length += len(token_ids)

    def apply(self, logits: torch.Tensor, proposed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Scores of [rows, vocabulary] from logits of that shape.

        The last row follows the committed tokens and all of `proposed` ([proposals]), the row before it all but the
        last of them, and so on. `positions` ([rows]) are those of the tokens to choose. The order is transformers':
        bias, repetition penalty, then presence and frequency penalties, which it does not have, then the minimum
        length.
        """
        params = self.params
        scores = logits + self._bias if params.logit_bias else logits
        if params.penalizes:
            scores = self._penalize(scores, proposed)
        if params.min_new_tokens > 0 and len(self._suppressed) > 0:
            too_early = (positions < self._first_free_position)[:, None]
            ended = scores[:, self._suppressed].masked_fill(too_early, -torch.inf)
            scores = scores.index_copy(1, self._suppressed, ended)
        return scores

    def _penalize(self, scores: torch.Tensor, proposed: torch.Tensor) -> torch.Tensor:
        params = self.params
        counts = self._counts + self._counts_within(proposed, len(scores))  # [rows, vocabulary]
        if params.repetition_penalty != 1.0:
            penalized = torch.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
            scores = torch.where(self._in_prompt | (counts > 0), penalized, scores)
        return scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)

    def _counts_within(self, proposed: torch.Tensor, rows: int) -> torch.Tensor:
        """How often each id stands among the proposals before each of the last rows, [rows, vocabulary]."""
        if rows == 1:
            # A draft's step: all of them stand before its one row.
            once = torch.ones_like(proposed, dtype=torch.int32)
            empty = torch.zeros(self._vocabulary, dtype=torch.int32, device=proposed.device)
            return empty.index_add_(0, proposed, once)[None]
        places = len(proposed) + 1
        within = torch.zeros((places, self._vocabulary), dtype=torch.int32, device=proposed.device)
        within[torch.arange(1, places, device=proposed.device), proposed] = 1
        return within.cumsum(dim=0, dtype=torch.int32)[-rows:]


def apply_histories(
    logits: torch.Tensor,
    proposed: torch.Tensor,
    positions: torch.Tensor,
    histories: Sequence[TokenHistory | None],
) -> torch.Tensor:
    """`TokenHistory.apply` for each session of a batch that has one; the others come back as they are.

    `logits` is [batch, rows, vocabulary] in float32, `proposed` [batch, rows - 1], `positions` [batch, rows].
    """
    if all(history is None for history in histories):
        return logits
    rows = [
        logits[index] if history is None else history.apply(logits[index], proposed[index], positions[index])
        for index, history in enumerate(histories)
    ]
    return torch.stack(rows)
