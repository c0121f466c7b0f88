"""A check at load that a model computes over a slot cache what it computes without one.

Families differ in how they use masks, positions and caches, and a family that ignores one of them would answer
nonsense without any error. Two forward passes over a few hundred tokens tell.
"""

from __future__ import annotations

import torch

from specpair.errors import ModelLoadError
from specpair_runtime.models.runner import ModelRunner

__all__ = ["check_slot_cache"]

# Beyond the shortest attended length, and beyond short local windows.
_PROMPT = 290
_CHUNK = 128
_BLOCK = 8
# Relative error of a row's logits. Rounding, where experts are routed by it included, stays below it in every format;
# a wrong mask or position stands far above.
_TOLERANCE = 0.15


def check_slot_cache(runner: ModelRunner) -> None:
    """Raises ModelLoadError naming `model` unless the runner agrees with a plain forward pass of eager attention.

    The slot is used as a session uses it: a prefill, a block of wrong tokens, and a block of the right ones over it.
    """
    prompt = min(_PROMPT, runner.max_length - 1)
    block = min(_BLOCK, runner.max_length - prompt, runner.scratch)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, runner.vocabulary, (1, prompt + block), generator=generator)
    wrong = torch.randint(0, runner.vocabulary, (1, block), generator=generator)
    start, length = torch.tensor([prompt]), runner.bucket(prompt, block)
    slot = runner.slots - 1
    try:
        for begin in range(0, prompt, _CHUNK):
            runner.prefill(slot, ids[0, begin : min(begin + _CHUNK, prompt)].tolist(), begin)
        runner.eager_logits(slot, wrong, start, length)
        over_slot = runner.eager_logits(slot, ids[:, prompt:], start, length).float()
        reference = runner.reference_logits(ids)[:, prompt:].float()
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _refusal(runner, str(error)) from error
    errors = (over_slot - reference).norm(dim=-1) / reference.norm(dim=-1).clamp(min=1e-6)
    # The median: where a router of experts stands between two of them, rounding may send single rows elsewhere.
    difference = float(errors.median())
    if not difference <= _TOLERANCE:
        raise _refusal(runner, f"its logits are off by {difference:.0%} from those of a plain forward pass")
    if not _is_causal(runner):
        raise ModelLoadError(f"{type(runner.model).__name__} sees the tokens that come after", field="model")


def _is_causal(runner: ModelRunner) -> bool:
    """Whether the first token's logits stay as they are when those behind it change."""
    ids = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3]]) % runner.vocabulary
    first, second = (runner.reference_logits(row[None])[0, 0].float() for row in ids)
    return bool((first - second).norm() <= _TOLERANCE * first.norm())


def _refusal(runner: ModelRunner, reason: str) -> ModelLoadError:
    advice = "" if runner.model.config._attn_implementation == "eager" else "; --attn-implementation eager may help"
    return ModelLoadError(
        f"{type(runner.model).__name__} does not run on a slot cache: {reason}{advice}", field="model"
    )
