"""The model card of the demo pair, written from what was measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Sample = dict[str, str]


@dataclass(frozen=True)
class CardFacts:
    """What the card quotes besides the measurements."""

    command: str
    seed: int
    machine: str
    length: int
    long_length: int
    long_share: float
    sample_minutes: float
    plain_share: float
    held_out: tuple[str, ...]


def machine_name() -> str:
    """The GPU in use, or how many cores of which processor."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or 'a CPU'}"


def _fenced(text: str) -> str:
    return f"```python\n{text}\n```\n"


def samples_section(samples: Sequence[Sample]) -> str:
    """The continuations as they came, prompt first."""
    parts = []
    for sample in samples:
        parts.append(f"### {sample['name']} ({sample['module']})\n\nPrompt:\n\n{_fenced(sample['text'])}")
        parts.append(f"Greedy:\n\n{_fenced(sample['greedy'])}")
        parts.append(f"Temperature 0.8:\n\n{_fenced(sample['sampled'])}")
    return "\n".join(parts)


def sources_table(sources: dict[str, Any]) -> str:
    """The training sources with their licences and sizes after cleaning."""
    rows = ["| source | version | licence | files | kB |", "|---|---|---|---:|---:|"]
    for one in sources["used"]:
        size = round(one["bytes"] / 1000)
        rows.append(f"| {one['name']} | {one['version']} | {one['licence']} | {one['files']} | {size} |")
    return "\n".join(rows)


def numbers_table(metrics: dict[str, Any]) -> str:
    """Both models side by side."""
    target, draft = metrics["target"], metrics["draft"]
    rows = ["| | target | draft |", "|---|---:|---:|"]
    for label, key, form in (
        ("parameters", "parameters", "{:,}"),
        ("layers × width", "shape", "{}"),
        ("training steps", "steps", "{:,}"),
        ("training tokens", "tokens", "{:,}"),
        ("training minutes", "minutes", "{:.1f}"),
        ("held-out loss, nats per token", "nats_per_token", "{:.3f}"),
        ("held-out loss, bits per byte", "bits_per_byte", "{:.3f}"),
        ("ms per token, float32", "ms_float32", "{:.2f}"),
        ("ms per token, bfloat16", "ms_bfloat16", "{:.2f}"),
    ):
        rows.append(f"| {label} | {form.format(target[key])} | {form.format(draft[key])} |")
    return "\n".join(rows)


def acceptance_table(metrics: dict[str, Any], block: int) -> str:
    """Acceptance on the demo prompts and on the held-out snippets."""
    rows = ["| | demo prompts | held-out snippets |", "|---|---:|---:|"]
    ours, theirs = metrics["acceptance_prompts"], metrics["acceptance_snippets"]
    for label, key, form in (
        ("prompts", "prompts", "{}"),
        ("greedy tokens", "greedy_tokens", "{:,}"),
        ("draft's greedy token is the target's", "greedy_agreement", "{:.1%}"),
        (f"accepted of proposed, blocks of {block}, greedy", "block_accepted_share", "{:.1%}"),
        (f"tokens per round, blocks of {block}, greedy", "block_tokens_per_round", "{:.2f}"),
        ("acceptance per token sampled at temperature 0.8", "sampled_acceptance_at_0.8", "{:.1%}"),
        ("repeated lines in greedy text", "greedy_repeated_lines", "{:.1%}"),
    ):
        rows.append(f"| {label} | {form.format(ours[key])} | {form.format(theirs[key])} |")
    return "\n".join(rows)


def training_section(facts: CardFacts, target: dict[str, Any]) -> str:
    """How both models were made."""
    rate = target["tokens"] / (60 * target["minutes"])
    return f"""Made with `{facts.command}` (seed {facts.seed}) on {facts.machine}.
The target saw {rate:,.0f} tokens a second. Minutes bound the run, not steps: a machine with nothing else to do, or a
GPU, which the command uses where there is one, gets further with the same command.

- Tokenizer: byte-level BPE with GPT-2's pre-tokenizer, {target["vocabulary"]:,} entries, one special token
  `<|endoftext|>` (id 0) that ends a document and pads a batch. Nothing is added to a text that is encoded.
- Target: bf16 autocast, Muon for the matrices inside layers and AdamW for embeddings and norms, learning rates that
  warm up, hold, and fall to zero with the clock. Windows of {facts.length} tokens, and of {facts.long_length} in the
  last {facts.long_share:.0%} of the time. Positions go to {target["positions"]:,}, but beyond {facts.long_length} the
  models are untrained.
- Draft: distilled from the target. Half of its tokens are corpus windows, half text that the target wrote
  itself after training prompts ({facts.sample_minutes:g} minutes of writing, two thirds of it greedy, one third at
  temperature 0.8). For the first {facts.plain_share:.0%} of the time it learns that text alone; then the loss mixes the
  divergence from the target's distribution with the target's likeliest token.
"""


def data_section(facts: CardFacts, sources: dict[str, Any]) -> str:
    """What the models read, and what they were kept from."""
    modules = ", ".join(f"`{path}`" for path in facts.held_out)
    refused = "; ".join(sources["refused"]) or "none"
    return f"""Pure-Python files of the standard library and of installed packages whose metadata declares a permissive
licence, checked by the script. Comments are removed, docstrings cut to their first line, duplicates, tests, generated
files, vendored copies and files that are mostly data left out. The standard library stands twice in the stream.

Held out whole:
{modules}.
No file of those names is read from anywhere, nor any file that shares more than a few long lines with them.
Relatives stay in (`asyncio/queues.py` is not `queue.py`, but resembles it).

{sources_table(sources)}

Named but refused for their licence or not installed: {refused}.
"""


def limits_section(metrics: dict[str, Any]) -> str:
    """What not to expect."""
    repeated = metrics["acceptance_snippets"]["greedy_repeated_lines"]
    return f"""These models exist to show speculative decoding on a laptop, not to write code. The target writes text
with the shape of Python: indentation, `self.` attributes, idioms of the standard library. It does not know what the
code is for and invents names. Greedy continuations of this length often fall into loops: {repeated:.0%} of the lines
written after held-out snippets repeat an earlier one, and such loops raise the greedy acceptance above, since a draft
follows a loop easily. It has seen no comments and hardly any prose.
"""


def model_card(facts: CardFacts, metrics: dict[str, Any], sources: dict[str, Any], shown: Sequence[Sample]) -> str:
    """The whole card."""
    ratio, half_ratio = (metrics["draft"][key] / metrics["target"][key] for key in ("ms_float32", "ms_bfloat16"))
    weight = metrics["draft"]["parameters"] / metrics["target"]["parameters"]
    block = metrics["acceptance_snippets"]["block"]
    return f"""# Demo pair

Two small Llama models of Python code and their tokenizer: `target/`, and `draft/`, distilled from it. Both load with
`AutoModelForCausalLM.from_pretrained`; weights are bf16. `prompts.json` has prompts to show, `heldout.jsonl` short
pieces for tests, all cut from modules that neither model saw.

## Numbers

{numbers_table(metrics)}

The draft takes {ratio:.1%} of the target's time for a token in float32, {half_ratio:.1%} in bfloat16, and has
{weight:.1%} of its parameters. Times are medians of one forward of one token after 128 cached ones with `transformers`
on {facts.machine}. The loss is over {metrics["target"]["held_out_tokens"]:,} tokens of held-out modules in windows of
{facts.length}.

## Acceptance on held-out code

{acceptance_table(metrics, block)}

Agreement is counted at every position of the target's own continuation of up to {metrics["continued"]} tokens. A round
proposes {block} tokens, keeps those up to the first disagreement, and adds one of the target's own.

## Training

{training_section(facts, metrics["target"])}
## Data

{data_section(facts, sources)}
## Limits

{limits_section(metrics)}
## Samples

As they came, {metrics["continued"]} tokens each, one draw at temperature 0.8.

{samples_section(shown)}"""
