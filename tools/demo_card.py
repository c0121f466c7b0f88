"""The model card of the demo pair, written from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class CardSettings(Protocol):
    """The settings the card quotes."""


def _fenced(text: str) -> str:
    return f"```python\n{text}\n```\n"


def samples_section(samples: Sequence[dict[str, str]]) -> str:
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


def acceptance_table(metrics: dict[str, Any]) -> str:
    """Acceptance on the demo prompts and on the held-out snippets."""
    rows = ["| | demo prompts | held-out snippets |", "|---|---:|---:|"]
    ours, theirs = metrics["acceptance_prompts"], metrics["acceptance_snippets"]
    for label, key, form in (
        ("prompts", "prompts", "{}"),
        ("greedy tokens", "greedy_tokens", "{:,}"),
        ("draft's greedy token is the target's", "greedy_agreement", "{:.1%}"),
        ("accepted of proposed, blocks of 4, greedy", "block_accepted_share", "{:.1%}"),
        ("tokens per round, blocks of 4, greedy", "block_tokens_per_round", "{:.2f}"),
        ("acceptance per token sampled at temperature 0.8", "sampled_acceptance_at_0.8", "{:.1%}"),
        ("repeated lines in greedy text", "greedy_repeated_lines", "{:.1%}"),
    ):
        rows.append(f"| {label} | {form.format(ours[key])} | {form.format(theirs[key])} |")
    return "\n".join(rows)


def model_card(config: CardSettings, kept: dict[str, Any], held_out: Sequence[str]) -> str:
    """The whole card; `kept` has the stages' metrics, sources and shown text."""
    return "\n".join([numbers_table(kept["metrics"]), acceptance_table(kept["metrics"])])
