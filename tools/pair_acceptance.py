"""What a draft's proposals are worth to a target, without running them against each other.

Under greedy decoding a proposal is accepted if it is the target's own choice behind the same tokens. So one forward
pass of the draft over what the target said tells for every position whether its proposal would have been accepted, and
from that follow the rounds of every draft length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from specpair.bench.theory import acceptance_per_token

__all__ = ["acceptance", "agreements", "find_factor", "tokens_per_round"]


@torch.inference_mode()
def agreements(
    target: PreTrainedModel, draft: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[list[bool]]:
    """For each prompt, whether the draft would have proposed each token of the target's greedy continuation.

    Prompts are cut to the length of the shortest, so that they run as one batch.
    """
    length = min(map(len, prompts))
    ids = torch.tensor([list(prompt[-length:]) for prompt in prompts])
    said = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
    )
    proposed = draft(said[:, :-1]).logits[:, length - 1 :].argmax(-1)
    return (proposed == said[:, length:]).tolist()


def tokens_per_round(agreed: Sequence[Sequence[bool]], draft_length: int) -> float:
    """What speculation with a fixed draft length would have come to; the last round of a prompt may be cut short."""
    tokens = rounds = 0
    for one in agreed:
        at = 0
        while at + draft_length < len(one):
            accepted = next((i for i in range(draft_length) if not one[at + i]), draft_length)
            at += accepted + 1
            tokens += accepted + 1
            rounds += 1
    return tokens / max(rounds, 1)


def acceptance(agreed: Sequence[Sequence[bool]], draft_length: int) -> float:
    """The rate a for which 1 + a + ... + a^k is the number of tokens per round: Leviathan et al. 2023, equation 1."""
    return acceptance_per_token(tokens_per_round(agreed, draft_length), draft_length)


def find_factor(
    measure: Callable[[float], float], wanted: float, *, low: float = 1e-3, high: float = 1.0, steps: int = 9
) -> tuple[float, float]:
    """The factor at which `measure`, which falls as the factor grows, comes nearest to `wanted`, and what it is there.

    Halves the interval of the factor's logarithm; measured acceptance is not quite monotonous, so the nearest counts.
    """
    tried: list[tuple[float, float]] = []
    for _ in range(steps):
        middle = math.sqrt(low * high)
        tried.append((middle, measure(middle)))
        if tried[-1][1] > wanted:
            low = middle
        else:
            high = middle
    return min(tried, key=lambda one: abs(one[1] - wanted))
