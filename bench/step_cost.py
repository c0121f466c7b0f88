"""What a verify step costs by its width, and what it says bit by bit: `python bench/step_cost.py MODEL`.

Two questions decide the default of `--verify-width` and the promise of identical output:

* cost: milliseconds of one step at several widths, batches and weight formats, all measured in turns in one run;
* bits: whether the logits of a row depend on where in the block it stands, on how many sessions share the step, on the
  attended length, and on the width.

Prints a table and writes JSON to bench/results/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from report import machine, pin, write_report
from specpair_runtime.models.lean import prepare
from specpair_runtime.models.loading import LoadedModel, load_model
from specpair_runtime.models.options import DtypeName, LoadOptions, QuantizationName
from specpair_runtime.models.runner import ModelRunner

__all__ = ["FORMATS", "SLOTS", "Cost", "Options", "compare_bits", "load", "measure_cost", "served"]

FORMATS: dict[str, tuple[DtypeName, QuantizationName]] = {
    "fp32": ("fp32", "none"),
    "bf16": ("bf16", "none"),
    "int8dyn": ("bf16", "int8dyn"),
    "int8wo": ("bf16", "int8wo"),
    "int8": ("bf16", "int8"),
    "int4wo": ("bf16", "int4wo"),
    "nf4": ("bf16", "nf4"),
    "fp4": ("bf16", "fp4"),
}
"""By name: dtype and quantization."""
SLOTS = 8
_MAX_LENGTH = 1024
_CONTEXT = 200
_SCRATCH = 16


@dataclass(frozen=True)
class Cost:
    """What one shape costs: median and interquartile range in milliseconds, and the ratio to a step of one row."""

    format: str
    sessions: int
    width: int
    milliseconds: float
    spread: float
    ratio_to_one_row: float


@dataclass(frozen=True)
class Options:
    """What is measured; defaults are those of the published figures."""

    model: str
    formats: tuple[str, ...] = tuple(FORMATS)
    widths: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    width: int = 8
    repeats: int = 15
    threads: int = 1


def load(model: str, name: str) -> LoadedModel:
    """A model on the CPU in one of `FORMATS`."""
    dtype, quantization = FORMATS[name]
    return load_model(LoadOptions(model=model, dtype=dtype, quantization=quantization, device="cpu"))


def served(loaded: LoadedModel, width: int) -> ModelRunner:
    """A runner as a service has it, its weights prepared for steps of `width` rows."""
    return ModelRunner(
        loaded.model,
        slots=SLOTS,
        max_length=_MAX_LENGTH,
        scratch=_SCRATCH,
        vocabulary=loaded.fingerprint.vocabulary_size,
        compile_=None,
        lean=prepare(loaded.model, positions=_MAX_LENGTH, rows=width, pack=True),
    )


def _text(runner: ModelRunner) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, runner.vocabulary, (_CONTEXT + _SCRATCH,), generator=generator).tolist()


def _prefill(runner: ModelRunner, slots: int) -> None:
    for slot in range(slots):
        runner.prefill(slot, _text(runner)[:_CONTEXT], 0)


def _step(runner: ModelRunner, batch: int, width: int, start: int = _CONTEXT, length: int = 256) -> torch.Tensor:
    """Logits of [width, vocabulary] of the first of `batch` sessions at the same place; the others say other things."""
    text = _text(runner)
    rows = torch.tensor([text[start - other * width :][:width] for other in range(batch)])
    return runner.logits(0, rows, torch.full((batch,), start), length)[0]


def measure_cost(runners: dict[str, ModelRunner], options: Options) -> Iterator[Cost]:
    """Median milliseconds of a step; shapes and formats take turns, so that noise meets all of them."""
    shapes = [(1, width) for width in options.widths] + [(batch, options.width) for batch in options.batches[1:]]
    times: dict[tuple[str, int, int], list[float]] = {}
    for runner in runners.values():
        _prefill(runner, SLOTS)
    for _ in range(options.repeats):
        for name, runner in runners.items():
            for batch, width in shapes:
                began = time.perf_counter()
                _step(runner, batch, width)
                times.setdefault((name, batch, width), []).append((time.perf_counter() - began) * 1e3)
    for (name, batch, width), spent in times.items():
        plain = statistics.median(times[name, 1, 1])
        median = statistics.median(spent)
        lower, _, upper = statistics.quantiles(spent, n=4)
        yield Cost(name, batch, width, round(median, 3), round(upper - lower, 3), round(median / plain, 3))


def compare_bits(name: str, runner: ModelRunner, options: Options) -> dict[str, object]:
    """How many rows differ in any bit from the same rows of one session's step, by what was changed."""
    width = options.width
    _prefill(runner, SLOTS)
    reference = _step(runner, 1, width).clone()
    alignment = 0
    for shift in range(1, width):
        _prefill(runner, 1)
        moved = _step(runner, 1, width, _CONTEXT - shift)[shift:]
        alignment += _rows_that_differ(moved, reference[: width - shift])
    _prefill(runner, SLOTS)
    batch = {str(size): _rows_that_differ(_step(runner, size, width), reference) for size in options.batches[1:]}
    length = {str(size): _rows_that_differ(_step(runner, 1, width, length=size), reference) for size in (512, 1024)}
    one_row = _rows_that_differ(_step(runner, 1, 1), reference[:1])
    return {
        "format": name,
        "width": width,
        "rows_by_alignment": [alignment, width * (width - 1) // 2],
        "rows_by_sessions": batch,
        "rows_by_attended_length": length,
        "first_row_differs_from_width_1": bool(one_row),
    }


def _rows_that_differ(left: torch.Tensor, right: torch.Tensor) -> int:
    return int((left != right).any(dim=-1).sum())


def _parse() -> tuple[Options, Path]:
    defaults = Options(model="")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=defaults.formats)
    parser.add_argument("--width", type=int, default=defaults.width, help="width whose bits are compared")
    parser.add_argument("--repeats", type=int, default=defaults.repeats)
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--output", type=Path, default=Path("bench/results/step_cost.json"))
    given = parser.parse_args()
    options = Options(
        model=given.model,
        formats=tuple(given.formats),
        width=given.width,
        repeats=given.repeats,
        threads=given.threads,
    )
    return options, given.output


def main() -> None:
    """Measures, prints and writes."""
    options, output = _parse()
    cores = pin(options.threads)
    torch.set_num_threads(options.threads)
    runners = {name: served(load(options.model, name), options.width) for name in options.formats}
    costs = list(measure_cost(runners, options))
    bits = [compare_bits(name, runner, options) for name, runner in runners.items()]
    for cost in costs:
        print(
            f"{cost.format:7} {cost.sessions} x {cost.width:2} rows "
            f"{cost.milliseconds:8.2f} ms  x{cost.ratio_to_one_row:.2f}"
        )
    for row in bits:
        print(row)
    figures = {"options": asdict(options), "cost": [asdict(cost) for cost in costs], "bits": bits}
    write_report(output, figures, machine(cores))


if __name__ == "__main__":
    main()
