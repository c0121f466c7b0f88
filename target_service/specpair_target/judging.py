"""What the target says to the rows of a step, given their logits.

Most sessions are greedy, and their choice is the best logit. The others have their logits processed, at the places of
their proposals and the one behind those: padding is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specpair_runtime.sampling.acceptance import accepted_lengths, leading
from specpair_runtime.sampling.choice import sample
from specpair_runtime.sampling.history import TokenHistory, apply_histories
from specpair_runtime.sampling.params import GREEDY, SamplingBatch, SamplingParams
from specpair_runtime.sampling.processors import process
from specpair_runtime.sampling.rejection import SparseProbs, judge_by_rejection

__all__ = ["Block", "Row", "judge"]

# Elements that are processed at a time on a CPU: more do not stay in its caches.
_AT_A_TIME = 1 << 18


@dataclass(frozen=True)
class Row:
    """One slot's part of a step: `token_ids` go to positions from `start` on, padded to the width.

    The first id is the last committed token, the others are proposals. `draft_probs` are what those were sampled from,
    for the rejection rule. `top_logprobs` asks for log probabilities: of the chosen token and of so many others.
    `traced` asks for what the judgement was based on.
    """

    start: int
    token_ids: Sequence[int]
    params: SamplingParams = GREEDY
    history: TokenHistory | None = None
    draft_probs: Sequence[SparseProbs] = ()
    top_logprobs: int | None = None
    traced: bool = False

    @property
    def rejects(self) -> bool:
        """Whether the rejection rule judges; at temperature 0 both rules are plain greedy."""
        return self.params.rejection and not self.params.greedy

    @property
    def processed(self) -> bool:
        """Whether its choices are made from more than the best logits."""
        return self.traced or self.history is not None or not self.params.greedy


@dataclass(frozen=True)
class Block:
    """A step's proposals on the device.

    `proposed` is [batch, width - 1], of which row b holds `counts[b]` ([batch]) proposals and padding; `positions` are
    those of the tokens to choose, [batch, width].
    """

    proposed: torch.Tensor
    counts: torch.Tensor
    positions: torch.Tensor


def judge(
    logits: torch.Tensor, best: torch.Tensor, block: Block, rows: Sequence[Row]
) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
    """How many proposals each session accepts, [batch]; the target's own token at each place, [batch, width]; and by
    index of a traced session the scores that decided, [proposals + 1, vocabulary].

    `logits` is [batch, width, vocabulary] and `best` the ids of the highest, [batch, width]. What an accepted token and
    the one behind it depend on is the session's own.
    """
    choices = best
    scores: dict[int, torch.Tensor] = {}
    coupled = [index for index, row in enumerate(rows) if not row.rejects and row.processed]
    rejecting = [index for index, row in enumerate(rows) if row.rejects]
    if coupled:
        choices = _choose(logits, choices, block, rows, coupled, scores)
    accepted = accepted_lengths(choices, block.proposed, block.counts)
    if rejecting:
        accepted, choices = _reject(logits, accepted, choices, block, rows, rejecting, scores)
    return accepted, choices, scores


def _choose(
    logits: torch.Tensor,
    choices: torch.Tensor,
    block: Block,
    rows: Sequence[Row],
    coupled: Sequence[int],
    scores: dict[int, torch.Tensor],
) -> torch.Tensor:
    """`choices` with those of the sessions in `coupled` made from processed scores."""
    places = [(index, place) for index in coupled for place in range(len(rows[index].token_ids))]
    within = torch.tensor(places, device=logits.device)
    unprocessed = []
    for index in coupled:
        row, judged = rows[index], len(rows[index].token_ids)
        own = logits[index, :judged].to(torch.float32)
        if row.history is not None:
            own = row.history.apply(own, block.proposed[index, : judged - 1], block.positions[index, :judged])
        unprocessed.append(own)
    raw = torch.cat(unprocessed)[:, None]  # [places, 1, vocabulary]
    at_a_time = max(1, _AT_A_TIME // raw.shape[-1]) if raw.device.type == "cpu" else len(raw)
    processed, chosen = [], []
    for begin in range(0, len(raw), at_a_time):
        params = SamplingBatch.of([rows[index].params for index, _ in places[begin : begin + at_a_time]], raw.device)
        part = raw[begin : begin + at_a_time]
        part = process(part, params) if params.any_sampled else part
        positions = block.positions[within[begin : begin + at_a_time, 0], within[begin : begin + at_a_time, 1]]
        chosen.append(sample(part, positions[:, None], params)[:, 0])
        processed.append(part)
    if any(rows[index].traced for index in coupled):
        lengths = [len(rows[index].token_ids) for index in coupled]
        scores.update(zip(coupled, torch.split(torch.cat(processed)[:, 0], lengths), strict=True))
    return choices.index_put((within[:, 0], within[:, 1]), torch.cat(chosen))


def _reject(
    logits: torch.Tensor,
    accepted: torch.Tensor,
    choices: torch.Tensor,
    block: Block,
    rows: Sequence[Row],
    rejecting: Sequence[int],
    scores: dict[int, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`accepted` and `choices` with those of the sessions in `rejecting` by the rejection rule."""
    these = torch.tensor(rejecting, device=logits.device)
    some = [rows[index] for index in rejecting]
    params = SamplingBatch.of([row.params for row in some], logits.device)
    proposed, counts, positions = block.proposed[these], block.counts[these], block.positions[these]
    raw = apply_histories(logits[these].to(torch.float32), proposed, positions, [row.history for row in some])
    processed = process(raw, params)
    draft_probs = [row.draft_probs for row in some]
    kept, replaced = judge_by_rejection(processed, proposed, counts, positions, params, draft_probs)
    for place, index in enumerate(rejecting):
        if rows[index].traced:
            scores[index] = processed[place, : len(rows[index].token_ids)]
    return accepted.index_put((these,), leading(kept, counts)), choices.index_put((these,), replaced)
