"""Distilling the draft: text the target itself writes, and a loss that pulls the draft to the target's choices."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM

from demo_training import Run, TokenIds, logits_of, random_windows

Temperature = float


@dataclass(frozen=True)
class SampleConfig:
    """How the target writes: rows at a time, tokens in a row, prompt lengths and temperatures taken in turn."""

    minutes: float
    seed: int
    rows: int = 64
    length: int = 384
    prompts: tuple[int, ...] = (64, 160)
    temperatures: tuple[Temperature, ...] = (0.0, 0.0, 0.8)


def choose(logits: Tensor, temperature: Temperature, generator: torch.Generator) -> Tensor:
    """One token per row [rows, 1] from logits [rows, vocabulary]; temperature 0 takes the likeliest."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


@torch.no_grad()
def write_on(
    model: LlamaForCausalLM, prompts: Tensor, count: int, temperature: Temperature, generator: torch.Generator
) -> Tensor:
    """Prompts [rows, n] with `count` tokens of the model's own after them: [rows, n + count]. The end is no stop."""
    cache = DynamicCache(config=model.config)
    step, written = prompts, [prompts]
    for _ in range(count):
        with torch.autocast(prompts.device.type, torch.bfloat16):
            output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step = choose(output.logits[:, -1].float(), temperature, generator)
        written.append(step)
    return torch.cat(written, dim=1)


def write_samples(target: LlamaForCausalLM, stream: TokenIds, config: SampleConfig) -> TokenIds:
    """Rows [n, length] that begin with training text and go on in the target's own words, for the minutes given."""
    generator = torch.Generator(device=target.device).manual_seed(config.seed)
    began, batches = time.monotonic(), list[TokenIds]()
    while not batches or time.monotonic() - began < 60 * config.minutes:
        turn = len(batches)
        prompt = config.prompts[turn % len(config.prompts)]
        temperature = config.temperatures[turn % len(config.temperatures)]
        windows = random_windows(stream, config.seed, turn, config.rows, prompt)[:, 1:].to(target.device)
        rows = write_on(target, windows, config.length - prompt, temperature, generator)
        batches.append(rows.cpu().numpy().astype(np.uint16))
    return np.concatenate(batches)


def distillation_loss(draft: Tensor, target: Tensor, hard_share: float) -> Tensor:
    """Mean loss of draft logits against target logits, both [tokens, vocabulary].

    The divergence from the target's distribution is what sampling is accepted by; the target's likeliest token is
    what greedy decoding is accepted by, and `hard_share` weighs the second.
    """
    soft = functional.kl_div(draft.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
    hard = functional.cross_entropy(draft, target.argmax(-1))
    return (1.0 - hard_share) * soft + hard_share * hard


def fit_draft(
    run: Run, target: LlamaForCausalLM, stream: TokenIds, samples: TokenIds, hard_share: float,
    report: Callable[[str], None],
) -> None:  # fmt: skip
    """Fits the draft to the target on the target's own writing and, for a third of each step, on the corpus."""
    device = run.model.device

    def batch_loss(step: int, length: int) -> Tensor:
        rows = run.schedule.tokens_per_step // length
        corpus = random_windows(stream, run.schedule.seed, step, rows // 3, length)[:, :length]
        picked = np.random.default_rng((run.schedule.seed, step, 1)).integers(0, len(samples), rows - rows // 3)
        own = torch.from_numpy(samples[picked, :length].astype(np.int64))
        ids = torch.cat([corpus, own]).to(device)
        with torch.no_grad():
            wanted = logits_of(target, ids).flatten(0, 1)
        loss = distillation_loss(logits_of(run.model, ids).flatten(0, 1), wanted, hard_share)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    run.fit(batch_loss, report)
