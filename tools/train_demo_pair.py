"""Trains the demo pair: a tokenizer, a target and a draft distilled from it, from Python sources at hand.

Each stage keeps its results under the work directory, so a run that was cut off goes on where it stood:

    python tools/train_demo_pair.py all
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_card import CardFacts, machine_name, model_card
from demo_corpus import Corpus, CorpusConfig, Document, build_corpus
from demo_distill import Lesson, SampleConfig, fit_draft, write_samples
from demo_evaluate import acceptance, continue_path, cut_prompts, cut_snippets, held_out_loss, milliseconds_per_token
from demo_ship import PROMPTS, export_model, write_json, write_text
from demo_training import (
    ModelShape,
    Run,
    Schedule,
    TokenIds,
    build_model,
    compile_layers,
    encode_documents,
    fit_language_model,
    pick_device,
    train_tokenizer,
)

TARGET = ModelShape(layers=12, hidden=256, heads=4, kv_heads=2, intermediate=640)
DRAFT = ModelShape(layers=2, hidden=128, heads=2, kv_heads=1, intermediate=320)


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line's defaults are these."""

    work: Path = field(
        default=Path("runs/demo"), metadata={"help": "where stages keep checkpoints, token streams and numbers"}
    )
    output: Path = field(default=Path("models/demo"), metadata={"help": "where the pair ships"})
    seed: int = field(default=20, metadata={"help": "seeds weights, order of text and sampling"})
    vocabulary: int = field(default=4096, metadata={"help": "entries of the tokenizer"})
    library_repeats: int = field(
        default=2, metadata={"help": "times the standard library stands in the training stream"}
    )
    minutes: float = field(default=72.0, metadata={"help": "time to train the target"})
    tokens_per_step: int = field(default=8192, metadata={"help": "tokens of one target step"})
    rows: int = field(default=16, metadata={"help": "windows of --length that pass through the target at once"})
    length: int = field(default=256, metadata={"help": "tokens in a window"})
    long_length: int = field(default=512, metadata={"help": "tokens in a window at the end of the run"})
    long_share: float = field(default=0.12, metadata={"help": "share of the time spent on long windows"})
    muon_lr: float = field(default=0.02, metadata={"help": "peak learning rate of matrices inside layers"})
    adam_lr: float = field(default=0.004, metadata={"help": "peak learning rate of embeddings and norms"})
    weight_decay: float = field(default=0.05, metadata={"help": "decay of matrices inside layers"})
    sample_minutes: float = field(default=5.0, metadata={"help": "time the target writes text for the draft"})
    sample_length: int = field(default=192, metadata={"help": "tokens in a row of that text"})
    draft_minutes: float = field(default=17.0, metadata={"help": "time to distil the draft"})
    draft_rows: int = field(default=32, metadata={"help": "rows of one draft step"})
    draft_adam_lr: float = field(
        default=0.006, metadata={"help": "peak learning rate of the draft's embeddings and norms"}
    )
    hard_share: float = field(
        default=0.4, metadata={"help": "weight of the target's likeliest token in the draft's loss"}
    )
    plain_share: float = field(default=0.4, metadata={"help": "share of the draft's time before the target's logits"})
    continued: int = field(default=96, metadata={"help": "tokens written after a prompt when evaluating"})
    block: int = field(default=4, metadata={"help": "proposals in a block when evaluating"})
    compiled: bool = field(default=True, metadata={"help": "compile layers for training"})


def report(line: str) -> None:
    """One line of progress, at once even into a file."""
    print(line, flush=True)


def write_corpus(corpus: Corpus, work: Path) -> None:
    """Keeps the held-out documents and the list of sources for the later stages."""
    held_out = [asdict(document) for document in corpus.held_out]
    sources = [
        {
            "name": source.name,
            "version": source.version,
            "licence": source.licence,
            "files": sum(document.source == source.name for document in corpus.train),
            "bytes": sum(len(document.text.encode()) for document in corpus.train if document.source == source.name),
        }
        for source in corpus.sources
    ]
    (work / "held_out.json").write_text(json.dumps(held_out, indent=1))
    (work / "sources.json").write_text(json.dumps({"used": sources, "refused": corpus.refused}, indent=1))


def stage_tokenizer(config: Config) -> None:
    """Builds the corpus, trains the tokenizer on it and writes the training stream as token ids."""
    config.work.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(CorpusConfig())
    write_corpus(corpus, config.work)
    tokenizer = train_tokenizer(corpus.train, config.vocabulary)
    tokenizer.save_pretrained(config.work / "tokenizer")

    def repeats(document: Document) -> int:
        return config.library_repeats if document.source == "python" else 1

    stream = encode_documents(tokenizer, corpus.train, repeats, config.seed)
    np.save(config.work / "stream.npy", stream)
    once = sum(len(document.text.encode()) for document in corpus.train)
    report(f"{len(corpus.train)} documents, {once} bytes; {len(stream)} tokens with repeats")


def load_tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """The tokenizer the first stage trained."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(config.work / "tokenizer")
    return tokenizer


def load_stream(config: Config) -> TokenIds:
    """The training text as one stream of token ids."""
    stream: TokenIds = np.load(config.work / "stream.npy")
    return stream


def schedule_of(config: Config) -> Schedule:
    """The target's schedule."""
    shared = {one.name for one in fields(Schedule)} & {one.name for one in fields(Config)}
    return Schedule(**{name: getattr(config, name) for name in shared})


def draft_schedule_of(config: Config) -> Schedule:
    """The draft's schedule: its own minutes and batch, at the length the samples have."""
    length = config.sample_length
    return replace(
        schedule_of(config),
        minutes=config.draft_minutes,
        tokens_per_step=config.draft_rows * length,
        length=length,
        long_share=0.0,
        adam_lr=config.draft_adam_lr,
        flat_share=0.1,
    )


def stage_target(config: Config) -> None:
    """Trains the target until its minutes are spent."""
    tokenizer = load_tokenizer(config)
    model = build_model(TARGET, config.vocabulary, tokenizer.eos_token_id, config.seed).to(pick_device())
    if config.compiled:
        compile_layers(model)
    run = Run(model, schedule_of(config), config.work / "target.pt")
    report(f"target: {sum(p.numel() for p in model.parameters())} parameters, from step {run.progress.step}")
    fit_language_model(run, load_stream(config), config.rows, report)


def load_trained(config: Config, name: str) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """A trained model with its weights rounded to bf16, as they ship, held in float32; and how it was trained."""
    saved = torch.load(config.work / f"{name}.pt", map_location="cpu", weights_only=True)
    end = load_tokenizer(config).eos_token_id
    model = build_model(TARGET if name == "target" else DRAFT, config.vocabulary, end, config.seed)
    model.load_state_dict({key: value.bfloat16().float() for key, value in saved["model"].items()})
    return model.eval().requires_grad_(False), saved["progress"]


def stage_samples(config: Config) -> None:
    """Has the target go on from training text, for the draft to learn from."""
    target = load_trained(config, "target")[0].to(pick_device(), torch.bfloat16)
    settings = SampleConfig(minutes=config.sample_minutes, seed=config.seed, length=config.sample_length)
    samples = write_samples(target, load_stream(config), settings)
    np.save(config.work / "samples.npy", samples)
    report(f"samples: {samples.shape[0]} rows of {samples.shape[1]} tokens")


def stage_draft(config: Config) -> None:
    """Distils the draft from the target until its minutes are spent."""
    device = pick_device()
    target = load_trained(config, "target")[0].to(device)
    end = load_tokenizer(config).eos_token_id
    draft = build_model(DRAFT, config.vocabulary, end, config.seed).to(device)
    if config.compiled:
        compile_layers(target)
        compile_layers(draft)
    run = Run(draft, draft_schedule_of(config), config.work / "draft.pt")
    report(f"draft: {sum(p.numel() for p in draft.parameters())} parameters, from step {run.progress.step}")
    samples: TokenIds = np.load(config.work / "samples.npy")
    fit_draft(
        run,
        Lesson(target, load_stream(config), samples, config.hard_share, config.plain_share, config.compiled),
        report,
    )


def load_held_out(config: Config) -> list[Document]:
    """The held-out modules as the first stage cleaned them."""
    return [Document(**one) for one in json.loads((config.work / "held_out.json").read_text())]


def stage_export(config: Config) -> None:
    """Writes models, tokenizer, prompts and held-out snippets where they ship."""
    tokenizer, documents = load_tokenizer(config), load_held_out(config)
    config.output.mkdir(parents=True, exist_ok=True)
    for name in ("target", "draft"):
        export_model(load_trained(config, name)[0], tokenizer, config.output / name)
    write_json(config.output / "prompts.json", cut_prompts(documents, PROMPTS))
    snippets = cut_snippets(documents, tokenizer, per_module=3, sizes=(60, 120, 200, 300))
    write_text(config.output / "heldout.jsonl", "".join(json.dumps(snippet) + "\n" for snippet in snippets))


def describe(config: Config, name: str, shape: ModelShape) -> dict[str, Any]:
    """One shipped model's size, training and held-out loss, and the time of one token in two precisions."""
    tokenizer = load_tokenizer(config)
    model, progress = load_trained(config, name)
    losses = held_out_loss(model, tokenizer, load_held_out(config), config.length)
    place = config.output / name
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": model.config.vocab_size,
        "positions": model.config.max_position_embeddings,
        "shape": f"{shape.layers} × {shape.hidden}",
        "steps": progress["step"],
        "tokens": progress["tokens"],
        "minutes": progress["seconds"] / 60,
        **losses,
        "ms_float32": milliseconds_per_token(LlamaForCausalLM.from_pretrained(place, dtype=torch.float32)),
        "ms_bfloat16": milliseconds_per_token(LlamaForCausalLM.from_pretrained(place, dtype=torch.bfloat16)),
    }


def show(config: Config, count: int) -> list[dict[str, str]]:
    """Each demo prompt with the target's greedy continuation and one at temperature 0.8."""
    tokenizer = load_tokenizer(config)
    target, draft = load_trained(config, "target")[0], load_trained(config, "draft")[0]
    shown = []
    for index, prompt in enumerate(json.loads((config.output / "prompts.json").read_text())):
        greedy = continue_path(target, draft, tokenizer, prompt["text"], count).text
        sampled = continue_path(target, draft, tokenizer, prompt["text"], count, 0.8, config.seed + index).text
        shown.append({**prompt, "greedy": greedy, "sampled": sampled})
    return shown


def stage_evaluate(config: Config) -> None:
    """Measures the shipped pair on held-out code and keeps the numbers and the text it writes."""
    tokenizer = load_tokenizer(config)
    target, draft = load_trained(config, "target")[0], load_trained(config, "draft")[0]
    prompts = [one["text"] for one in json.loads((config.output / "prompts.json").read_text())]
    snippets = [json.loads(line)["text"] for line in (config.output / "heldout.jsonl").read_text().splitlines()]
    metrics = {
        "target": describe(config, "target", TARGET),
        "draft": describe(config, "draft", DRAFT),
        "continued": config.continued,
        "acceptance_prompts": acceptance(target, draft, tokenizer, prompts, config.continued, config.block),
        "acceptance_snippets": acceptance(target, draft, tokenizer, snippets, config.continued, config.block),
    }
    write_json(config.work / "metrics.json", metrics)
    write_json(config.work / "shown.json", show(config, config.continued))
    report(json.dumps(metrics, indent=2))


def command_of(config: Config) -> str:
    """The one command that makes this pair, with the settings that are not defaults."""
    told = [
        f"--{one.name.replace('_', '-')} {getattr(config, one.name)}"
        for one in fields(Config)
        if getattr(config, one.name) != one.default and one.name not in ("work", "output", "compiled")
    ]
    return " ".join(["python tools/train_demo_pair.py all", *told])


def stage_card(config: Config) -> None:
    """Writes the model card from the numbers measured."""
    kept = {name: json.loads((config.work / f"{name}.json").read_text()) for name in ("metrics", "sources", "shown")}
    facts = CardFacts(
        command=command_of(config),
        seed=config.seed,
        machine=machine_name(),
        length=config.length,
        long_length=config.long_length,
        long_share=config.long_share,
        sample_minutes=config.sample_minutes,
        plain_share=config.plain_share,
        held_out=tuple(document.path for document in load_held_out(config)),
    )
    write_text(config.output / "README.md", model_card(facts, kept["metrics"], kept["sources"], kept["shown"]))


STAGES = {
    "tokenizer": stage_tokenizer,
    "target": stage_target,
    "samples": stage_samples,
    "draft": stage_draft,
    "export": stage_export,
    "evaluate": stage_evaluate,
    "card": stage_card,
}
"""Every stage, in the order that `all` runs them."""


def parse(arguments: list[str] | None = None) -> tuple[list[str], Config]:
    """The stages to run and their settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"], help="stages to run, in this order")
    for entry in fields(Config):
        flag, default = "--" + entry.name.replace("_", "-"), entry.default
        help_text = entry.metadata["help"]
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help_text)
        else:
            parser.add_argument(flag, type=type(default), default=default, help=help_text)
    values = vars(parser.parse_args(arguments))
    return values.pop("stages"), Config(**values)


def main() -> None:
    """Runs the stages asked for."""
    stages, config = parse()
    for name in STAGES if "all" in stages else stages:
        STAGES[name](config)


if __name__ == "__main__":
    main()
