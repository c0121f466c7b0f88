"""transformers' own decoding loops on a pair of models, in this process: what a user of `generate` can choose from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

from measuring import GENERATE, Generation

__all__ = ["NAMES", "TransformersLoop", "load_loops"]

NAMES = (GENERATE, "generate-static", "generate-compiled", "generate-assisted", "generate-lookup")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(slots=True)
class _Count:
    """What a loop with proposals did."""

    rounds: int = 0
    proposed: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class TransformersLoop:
    """`generate` with some options: greedy, a fixed number of new tokens, the end of sequence ignored."""

    name: str
    model: Any
    max_new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    draft_length: int | None = None

    def run(self, prompt: Sequence[int]) -> Generation:
        """Continues a prompt and times it."""
        ids = torch.tensor([prompt], device=self.model.device)
        mask = torch.ones_like(ids)
        began = time.perf_counter()
        with _counted(self.model) as count:
            output = self.model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=self.max_new_tokens, **self.options
            )
        # The copy to the host waits for the device.
        tokens = tuple(output[0, len(prompt) :].tolist())
        seconds = time.perf_counter() - began
        return Generation(tokens, seconds, count.rounds or len(tokens), count.proposed, count.accepted)


def load_loops(
    models: Path, names: Sequence[str], *, dtype: str, device: str, max_new_tokens: int, draft_length: int
) -> list[TransformersLoop]:
    """The loops of these names on `models`/target and, for assisted generation, `models`/draft.

    They share one copy of the weights. Prompt lookup proposes as many tokens as the draft model.
    """
    target = _load(models / "target", dtype, device)
    options: dict[str, Mapping[str, Any]] = {
        GENERATE: {},
        # Elsewhere than on a CPU a static cache alone would compile.
        "generate-static": {"cache_implementation": "static", "disable_compile": True},
        "generate-compiled": {"cache_implementation": "static", "compile_config": _compile_everywhere()},
        "generate-lookup": {"prompt_lookup_num_tokens": draft_length},
    }
    if "generate-assisted" in names:
        draft = _load(models / "draft", dtype, device)
        # As many proposals in every round, however unsure the draft is: the like of a fixed draft length elsewhere.
        draft.generation_config.num_assistant_tokens = draft_length
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        options["generate-assisted"] = {"assistant_model": draft}
    # Prompt lookup proposes less where it finds less.
    lengths = {"generate-assisted": draft_length}
    return [TransformersLoop(name, target, max_new_tokens, options[name], lengths.get(name)) for name in names]


def _load(path: Path, dtype: str, device: str) -> Any:  # noqa: ANN401 - transformers' models are untyped here
    model = AutoModelForCausalLM.from_pretrained(path, dtype=_DTYPES[dtype]).to(device).eval()
    # Not the checkpoint's own: it ends a generation at the end of sequence.
    model.generation_config = GenerationConfig(do_sample=False)
    return model


def _compile_everywhere() -> Any:  # noqa: ANN401
    config = CompileConfig()
    config._compile_all_devices = True  # transformers' switch for CPUs, which it leaves out otherwise
    return config


@contextlib.contextmanager
def _counted(model: Any) -> Iterator[_Count]:  # noqa: ANN401
    """Counts proposals meanwhile; `generate` itself does not report them.

    Whoever makes candidates is told after each round what became of them: that call is listened to.
    """
    count = _Count()
    make = model._get_candidate_generator

    def make_listened(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        generator = make(*args, **kwargs)
        update = generator.update_candidate_strategy

        def listen(input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
            count.rounds += 1
            count.proposed += scores.shape[1] - 1  # one more than proposals: the token behind them
            count.accepted += int(num_matches)
            update(input_ids, scores, num_matches)

        generator.update_candidate_strategy = listen
        return generator

    model._get_candidate_generator = make_listened
    try:
        yield count
    finally:
        del model._get_candidate_generator
