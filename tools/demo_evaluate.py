"""What the demo pair is worth on held-out code: loss, acceptance, cost per token, and what its text looks like."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_corpus import Document
from demo_distill import write_on

Snippet = dict[str, str]


@dataclass(frozen=True)
class PromptPlace:
    """Where a demo prompt stands: it begins at the first line that starts with `begins`, and is `lines` long."""

    name: str
    module: str
    begins: str
    lines: int


def cut_prompts(documents: Sequence[Document], places: Sequence[PromptPlace]) -> list[Snippet]:
    """The demo prompts, cut from held-out text; a place that this Python's library lacks is left out.

    A prompt ends without its line break: the tokenizer joins a line break with the indentation after it.
    """
    texts = {document.path.removesuffix(".py"): document.text.splitlines() for document in documents}
    prompts = []
    for place in places:
        lines = texts.get(place.module, [])
        starts = [index for index, line in enumerate(lines) if line.strip().startswith(place.begins)]
        if starts:
            text = "\n".join(lines[starts[0] : starts[0] + place.lines])
            prompts.append({"name": place.name, "module": place.module, "text": text})
    return prompts


def _blocks(document: Document, tokenizer: PreTrainedTokenizerFast, sizes: Sequence[int]) -> Iterator[str]:
    """Stretches of whole lines that begin at a definition, each near the next of the sizes asked for, in tokens."""
    lines = document.text.splitlines(keepends=True)
    starts = [index for index, line in enumerate(lines) if re.match(r"\s*(async def|def|class) ", line)]
    free = 0
    for turn, start in enumerate(starts):
        if start < free:
            continue
        wanted, used, stop = sizes[turn % len(sizes)], 0, start
        while stop < len(lines) and used < wanted:
            used += len(tokenizer(lines[stop])["input_ids"])
            stop += 1
        if 40 <= used <= 400:
            free = stop
            yield "".join(lines[start:stop]).rstrip("\n")


def cut_snippets(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, per_module: int, sizes: Sequence[int]
) -> list[Snippet]:
    """A few held-out snippets of 40 to 400 tokens from each held-out module."""
    snippets = []
    for document in documents:
        blocks = list(_blocks(document, tokenizer, sizes))
        step = max(1, len(blocks) // per_module)
        for text in blocks[::step][:per_module]:
            snippets.append({"module": document.path.removesuffix(".py"), "text": text})
    return snippets


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], length: int
) -> dict[str, float]:
    """Mean loss over the held-out modules, read in windows of `length` tokens that start with the end token."""
    nats, tokens, size = 0.0, 0, 0
    for document in documents:
        ids = tokenizer(document.text, return_tensors="pt")["input_ids"].to(model.device)
        size += len(document.text.encode())
        tokens += ids.shape[1]
        for part in ids.split(length, dim=1):
            begun = functional.pad(part, (1, 0), value=tokenizer.eos_token_id)
            logits = model(input_ids=begun[:, :-1], use_cache=False).logits.float()
            nats += float(functional.cross_entropy(logits[0], part[0], reduction="sum"))
    return {"nats_per_token": nats / tokens, "bits_per_byte": nats / math.log(2) / size, "held_out_tokens": tokens}


def block_counts(agrees: Sequence[bool], block: int) -> tuple[int, int, int]:
    """Rounds, accepted and written tokens of greedy speculation, from where the draft agrees along the target's path.

    A round proposes `block` tokens, keeps those up to the first disagreement and adds one of the target's own. This
    is exact: until the first disagreement the draft's context is the target's path.
    """
    rounds = accepted = position = 0
    while position + block < len(agrees):
        run = 0
        while run < block and agrees[position + run]:
            run += 1
        rounds, accepted, position = rounds + 1, accepted + run, position + run + 1
    return rounds, accepted, position


@dataclass(frozen=True)
class Continuation:
    """One continuation: its text, where the draft agreed, and the overlap of both distributions (1 - TV)."""

    text: str
    agrees: tuple[bool, ...]
    overlap: tuple[float, ...]


@torch.no_grad()
def continue_path(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, count: int,
    temperature: float = 0.0, seed: int = 0,
) -> Continuation:  # fmt: skip
    """The target's own continuation of a prompt, up to its end token, and the draft's proposals along it."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    generator = torch.Generator().manual_seed(seed)
    written = write_on(target, ids, count, temperature, generator)
    new = written[0, ids.shape[1] :].tolist()
    kept = new.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in new else len(new)
    written = written[:, : ids.shape[1] + kept]
    places = slice(ids.shape[1] - 1, written.shape[1] - 1)
    theirs = target(input_ids=written, use_cache=False).logits[0, places].float()
    ours = draft(input_ids=written, use_cache=False).logits[0, places].float()
    scale = temperature or 1.0
    overlap = torch.minimum((theirs / scale).softmax(-1), (ours / scale).softmax(-1)).sum(-1)
    agrees = ours.argmax(-1) == written[0, ids.shape[1] :]
    return Continuation(tokenizer.decode(new[:kept]), tuple(agrees.tolist()), tuple(overlap.tolist()))


def repeated_lines(text: str) -> float:
    """The share of a text's lines of ten characters or more that it already had: loops show here."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) >= 10]
    return 1.0 - len(set(lines)) / len(lines) if lines else 0.0


def acceptance(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str], count: int, block: int,
) -> dict[str, float]:  # fmt: skip
    """Greedy and sampled acceptance over prompts, `count` tokens each, and the tokens a block of proposals brings."""
    greedy = [continue_path(target, draft, tokenizer, prompt, count) for prompt in prompts]
    sampled = [continue_path(target, draft, tokenizer, p, count, 0.8, n) for n, p in enumerate(prompts)]
    agrees = [agree for one in greedy for agree in one.agrees]
    blocks = [block_counts(one.agrees, block) for one in greedy]
    rounds, accepted, written = (sum(column) for column in zip(*blocks, strict=True))
    return {
        "prompts": len(prompts),
        "greedy_tokens": len(agrees),
        "greedy_agreement": statistics.fmean(agrees),
        "block": block,
        "block_accepted_share": accepted / (block * rounds),
        "block_tokens_per_round": written / rounds,
        "sampled_acceptance_at_0.8": statistics.fmean(value for one in sampled for value in one.overlap),
        "greedy_repeated_lines": statistics.fmean(repeated_lines(one.text) for one in greedy),
    }


@torch.inference_mode()
def milliseconds_per_token(model: LlamaForCausalLM, context: int = 128, count: int = 100) -> float:
    """The median time of one forward of one token after a cached context."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.ones((1, context), dtype=torch.long, device=model.device), past_key_values=cache)
    one: Tensor = torch.ones((1, 1), dtype=torch.long, device=model.device)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        model(input_ids=one, past_key_values=cache)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)
