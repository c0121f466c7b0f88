"""Why a proposal was accepted or not, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specpair_runtime.sampling.choice import sample
from specpair_runtime.sampling.params import SamplingBatch, SamplingParams
from specpair_runtime.sampling.rejection import SparseProbs
from specpair_target.verifier import Judgement

__all__ = ["PositionExplanation", "explain"]


@dataclass(frozen=True)
class PositionExplanation:
    """The verdict at one position.

    `proposed` is None behind the last proposal. `target_token` is the target's own choice given the proposals before
    it: its most probable token in greedy sessions, its draw with the session's noise in sampled ones. Probabilities are
    those of the proposed id after all processors, behind the last proposal of the target's own choice; `draft_prob` is
    None when the draft's is not known. `top2_margin` is the logit of the most probable id less that of the second.
    """

    position: int
    proposed: int | None
    target_token: int
    target_prob: float
    draft_prob: float | None
    top2_margin: float
    accepted: bool
    reason: str


def explain(
    base_length: int,
    proposal: Sequence[int],
    draft_probs: Sequence[SparseProbs],
    params: SamplingParams,
    judgement: Judgement,
) -> list[PositionExplanation]:
    """One explanation for each proposal that was judged, and one for the place behind them.

    The judgement must come with its trace. A proposal that reaches into the next attended length is judged up to there,
    and the last explanation is of the place where it was cut.
    """
    trace = judgement.trace
    assert trace is not None
    probs = trace.scores.softmax(dim=-1)
    margins = trace.logits.topk(2, dim=-1).values
    positions = base_length + torch.arange(len(probs))
    own = sample(trace.scores[None], positions[None], SamplingBatch.of([params], torch.device("cpu")))[0].tolist()
    explained = []
    for row in range(len(probs)):
        judged = row < len(probs) - 1
        proposed = proposal[row] if judged else None
        draft_prob = _draft_prob(draft_probs[row], proposal[row]) if judged and draft_probs else None
        target_prob = float(probs[row, proposed if proposed is not None else own[row]])
        explained.append(
            PositionExplanation(
                position=base_length + row,
                proposed=proposed,
                target_token=own[row],
                target_prob=target_prob,
                draft_prob=draft_prob,
                top2_margin=float(margins[row, 0] - margins[row, 1]),
                accepted=row < judgement.accepted,
                reason=_reason(row, judgement.accepted, params, target_prob, draft_prob)
                if judged
                else _reason_behind(cut=row < len(proposal), reached=row == judgement.accepted),
            )
        )
    return explained


def _draft_prob(distribution: SparseProbs, token_id: int) -> float:
    return dict(zip(distribution.token_ids, distribution.probs, strict=True))[token_id]


def _reason(row: int, accepted: int, params: SamplingParams, target_prob: float, draft_prob: float | None) -> str:
    if row > accepted:
        return "not reached: a proposal before it was rejected"
    verdict = "accepted" if row < accepted else "rejected"
    if params.rejection and not params.greedy:
        chance = min(1.0, target_prob / (1.0 if draft_prob is None else draft_prob))
        return f"{verdict}: the chance of acceptance was {chance:.3f}"
    own = "most probable token" if params.greedy else "choice under the shared noise"
    return f"{verdict}: it is {'' if row < accepted else 'not '}the target's {own}"


def _reason_behind(*, cut: bool, reached: bool) -> str:
    if cut:
        return "the proposal is cut here: this position belongs to the next attended length"
    return "nothing was proposed here: the target speaks for itself" if reached else "not reached"
