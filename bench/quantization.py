"""What each format of the weights costs and how true it is: `python bench/quantization.py`.

Measures the demo target, and a random one of about 90 million parameters that it makes for itself, in all formats of
`step_cost.py`:

* bytes of the weights, and seconds to load them;
* milliseconds of a step of 1 row, of W rows, and of 8 sessions with W rows each, taken in turns;
* how far the logits are from those of bf16 on held-out text, and how often the best token is the same;
* whether a row's bits depend on its place in the block or on how many sessions share the step.

Prints tables and writes JSON to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

import step_cost
from report import OtherWork, machine, pin, write_report
from specpair_runtime.models.runner import ModelRunner

_DEMO = Path("models/demo")
# 12 layers of 768: 91 million parameters.
_RANDOM = ("--hidden-size", "768", "--layers", "12")


@dataclass(frozen=True)
class Options:
    """What is measured; defaults are those of the published figures."""

    formats: tuple[str, ...] = tuple(step_cost.FORMATS)
    width: int = 8
    repeats: int = 15
    loads: int = 3
    documents: int = 12
    tokens: int = 256
    """Of each document, a multiple of the width."""
    threads: int = 1


def texts(options: Options) -> list[list[int]]:
    """Ids of held-out documents, as many tokens of each."""
    tokenizer = AutoTokenizer.from_pretrained(_DEMO / "target")
    lines = (_DEMO / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    every = (tokenizer(json.loads(line)["text"])["input_ids"] for line in lines)
    long = (ids[: options.tokens] for ids in every if len(ids) >= options.tokens)
    return [ids for ids, _ in zip(long, range(options.documents), strict=False)]


def logits(runner: ModelRunner, documents: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Logits of [all tokens, vocabulary], computed in blocks as a target verifies them."""
    blocks = []
    for ids in documents:
        for start in range(0, len(ids), width):
            rows = torch.tensor([ids[start : start + width]])
            blocks.append(runner.logits(0, rows, torch.tensor([start]), runner.bucket(start, width))[0].float())
    return torch.cat(blocks)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights, what they were quantized by included."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    total = 0
    for tensor in tensors.values():
        total += tensor.nbytes
        # bitsandbytes keeps its scales beside the parameter.
        for scales in (getattr(getattr(tensor, "quant_state", None), "absmax", None), getattr(tensor, "SCB", None)):
            total += 0 if scales is None else scales.nbytes
    return total


def measure(model: str, options: Options) -> Iterator[dict[str, object]]:
    """One row of figures for each format."""
    documents = texts(options)
    seconds: dict[str, list[float]] = {}
    sizes, runners = {}, {}
    for _ in range(options.loads):
        for name in options.formats:
            began = time.perf_counter()
            loaded = step_cost.load(model, name)
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            sizes[name] = weight_bytes(loaded.model)
            runners[name] = step_cost.served(loaded, options.width)
    shapes = step_cost.Options(
        model, options.formats, (1, options.width), (1, step_cost.SLOTS), options.width, options.repeats
    )
    costs: dict[str, dict[str, float]] = {}
    for cost in step_cost.measure_cost(runners, shapes):
        costs.setdefault(cost.format, {})[f"{cost.sessions}x{cost.width}"] = cost.milliseconds
    truth = logits(runners["bf16"], documents, options.width)
    for name, runner in runners.items():
        said = truth if name == "bf16" else logits(runner, documents, options.width)
        bits = step_cost.compare_bits(name, runner, shapes)
        yield {
            "format": name,
            "megabytes": round(sizes[name] / 1e6, 1),
            "load_seconds": round(statistics.median(seconds[name]), 2),
            "milliseconds": costs[name],
            "same_best_token": round(float((said.argmax(-1) == truth.argmax(-1)).float().mean()), 4),
            "logit_error": round(float(((said - truth).norm(dim=-1) / truth.norm(dim=-1)).median()), 4),
            "rows_that_differ_by_place": bits["rows_by_alignment"],
            "rows_that_differ_by_sessions": bits["rows_by_sessions"],
        }


def show(title: str, rows: Sequence[dict[str, object]]) -> None:
    """Prints a table in Markdown."""
    print(f"\n{title}\n\n| format | MB | load s | ms 1x1 | 1xW | 8xW | same best token | logit error | rows differ |")
    print("| --- " * 9 + "|")
    for row in rows:
        times = " | ".join(f"{value:.2f}" for value in dict(row["milliseconds"]).values())  # type: ignore[call-overload]
        differ = f"{row['rows_that_differ_by_place']}, {row['rows_that_differ_by_sessions']}"
        print(f"| {row['format']} | {row['megabytes']} | {row['load_seconds']} | {times} ", end="")
        print(f"| {row['same_best_token']:.2%} | {row['logit_error']:.4f} | {differ} |")


def _parse() -> tuple[Options, Path]:
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=list(step_cost.FORMATS), default=defaults.formats)
    for name in ("width", "repeats", "loads", "documents", "tokens", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name), metavar="N")
    parser.add_argument("--output", type=Path, default=Path("bench/results/quantization.json"))
    given = vars(parser.parse_args())
    output = given.pop("output")
    # What the others are compared with.
    formats = tuple(dict.fromkeys(("bf16", *given.pop("formats"))))
    return Options(formats=formats, **given), output


def main() -> None:
    """Measures, prints and writes."""
    options, output = _parse()
    cores, other = pin(options.threads), OtherWork()
    facts = machine(cores)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="specpair-quantization-") as place:
        subprocess.run([sys.executable, "tools/make_benchmark_pair.py", place, *_RANDOM], check=True)
        models = {"demo": str(_DEMO / "target"), "random": f"{place}/target"}
        found = {}
        for title, model in models.items():
            found[title] = list(measure(model, options))
            show(title, found[title])
    write_report(output, {"options": asdict(options), "other_work_cores": other.cores(), "models": found}, facts)


if __name__ == "__main__":
    main()
