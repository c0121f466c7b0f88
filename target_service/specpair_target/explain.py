"""Why a proposal was accepted or not, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specpair_runtime.sampling.params import SamplingParams
from specpair_runtime.sampling.rejection import SparseProbs
from specpair_target.verifier import Judgement

__all__ = ["PositionExplanation", "explain"]


@dataclass(frozen=True)
class PositionExplanation:
    """The verdict at one position.

    `proposed` is None behind the last proposal. Probabilities are those of the proposed id, behind the last proposal of
    the target's own; `draft_prob` is None when the draft's is not known. `top2_margin` is the score of the most
    probable id less that of the second.
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

    The judgement must come with its trace.
    """
    trace = judgement.trace
    assert trace is not None
    probs = trace.scores.softmax(dim=-1)
    best = trace.scores.topk(2, dim=-1).values
    explained = []
    for row in range(len(probs)):
        proposed = proposal[row] if row < len(probs) - 1 else None
        target_token = trace.choices[row]
        draft_prob = _draft_prob(draft_probs[row], proposed) if proposed is not None and draft_probs else None
        target_prob = float(probs[row, proposed if proposed is not None else target_token])
        accepted = row < judgement.accepted
        explained.append(
            PositionExplanation(
                position=base_length + row,
                proposed=proposed,
                target_token=target_token,
                target_prob=target_prob,
                draft_prob=draft_prob,
                top2_margin=float(best[row, 0] - best[row, 1]),
                accepted=accepted,
                reason=_reason(row, judgement.accepted, proposed, target_prob, draft_prob, params),
            )
        )
    return explained


def _draft_prob(distribution: SparseProbs, token_id: int) -> float:
    return dict(zip(distribution.token_ids, distribution.probs, strict=True))[token_id]


def _reason(
    row: int,
    accepted: int,
    proposed: int | None,
    target_prob: float,
    draft_prob: float | None,
    params: SamplingParams,
) -> str:
    if proposed is None:
        return "nothing was proposed here; the target speaks for itself" if row == accepted else "not reached"
    if row > accepted:
        return "not reached: a proposal before it was rejected"
    if params.rejection and not params.greedy:
        ratio = min(1.0, target_prob / (1.0 if draft_prob is None else draft_prob))
        return f"{'accepted' if row < accepted else 'rejected'}: the chance of acceptance was {ratio:.3f}"
    own = "most probable token" if params.greedy else "choice under the shared noise"
    return f"accepted: it is the target's {own}" if row < accepted else f"rejected: it is not the target's {own}"
