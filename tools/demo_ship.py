"""Writing the demo pair where it ships: both models in bf16 with their tokenizer, prompts, snippets and model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_evaluate import PromptPlace

PROMPTS: tuple[PromptPlace, ...] = (
    PromptPlace("queue-put", "queue", "def put(self, item", 8),
    PromptPlace("config-section", "configparser", "def add_section(", 6),
    PromptPlace("low-median", "statistics", "def median_low(", 7),
    PromptPlace("calendar-day", "calendar", "class TextCalendar(", 11),
    PromptPlace("fraction-text", "fractions", "def __repr__(", 8),
    PromptPlace("file-wrapper", "tempfile", "def __enter__(", 6),
    PromptPlace("topological-sort", "graphlib", "class TopologicalSorter", 11),
    PromptPlace("csv-writer", "csv", "class DictWriter", 8),
    PromptPlace("scheduler", "sched", "def enterabs(", 6),
    PromptPlace("command-line", "cmd", "def parseline(", 8),
)


def replace_directory(made: Path, place: Path) -> None:
    """Puts a finished directory in place of an older one."""
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    made.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, value: object) -> None:
    """Writes a value as readable JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def name_tokenizer_class(directory: Path) -> None:
    """Names the fast tokenizer by the class that every transformers release knows."""
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, settings)


def export_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, place: Path) -> None:
    """Writes one model directory: weights in bf16, configuration, greedy generation by default, tokenizer."""
    made = place.with_name(f".{place.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    end = tokenizer.eos_token_id
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end)
    half.save_pretrained(made)
    tokenizer.save_pretrained(made)
    name_tokenizer_class(made)
    for file in made.iterdir():
        file.chmod(0o644)
    replace_directory(made, place)
