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

from demo_training import Run, TokenIds, logits_of, next_token_loss, random_windows

Temperature = float


@dataclass(frozen=True)
class SampleConfig:
    """How the target writes: rows at a time, tokens in a row, prompt lengths and temperatures taken in turn."""

    minutes: float
    seed: int
    length: int
    rows: int = 128
    prompts: tuple[int, ...] = (32, 96)
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


@dataclass(frozen=True)
class Lesson:
    """What the draft learns from: the target, corpus stream, the target's own rows [n, length], and the loss's mix.

    For the first `plain_share` of the time it learns the text alone: greedy rows already say what the target would
    choose, and a step without the target's logits takes a third of the time.
    """

    target: LlamaForCausalLM
    stream: TokenIds
    samples: TokenIds
    hard_share: float
    plain_share: float
    compiled: bool


def fit_draft(run: Run, lesson: Lesson, report: Callable[[str], None]) -> None:
    """Fits the draft on the target's own writing and, for half of each step's tokens, on longer corpus windows."""
    schedule, device = run.schedule, run.model.device
    loss_of = torch.compile(distillation_loss, dynamic=False) if lesson.compiled else distillation_loss

    def loss_on(ids: Tensor) -> Tensor:
        if run.share < lesson.plain_share:
            return next_token_loss(run.model, ids)
        with torch.no_grad():
            wanted = logits_of(lesson.target, ids[:, :-1]).flatten(0, 1)
        loss: Tensor = loss_of(logits_of(run.model, ids[:, :-1]).flatten(0, 1), wanted, lesson.hard_share)
        return loss

    def batch_loss(step: int, length: int) -> Tensor:
        rows = schedule.tokens_per_step // length
        count = max(1, rows * length // (2 * schedule.long_length))
        corpus = random_windows(lesson.stream, schedule.seed, step, count, schedule.long_length)
        generator = np.random.default_rng((schedule.seed, step, 1))
        picked = generator.integers(0, len(lesson.samples), rows - rows // 2)
        own = torch.from_numpy(lesson.samples[picked, :length].astype(np.int64))
        total = (loss_on(corpus.to(device)) + loss_on(own.to(device))) / 2
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    run.fit(batch_loss, report)
