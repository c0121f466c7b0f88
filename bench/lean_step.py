"""What a step costs in the model's own code and in the lean decoder: `python bench/lean_step.py MODEL [MODEL ...]`.

Both run in this process, in turns, on one thread, over the same slots; medians of `--repeats` steps. The model's own
code is what `--no-lean` serves: the same slot cache and attention, plain linear layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from report import OtherWork, machine, pin, write_report
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.options import DtypeName
from specpair_runtime.models.serving_model import load_serving_model
from specpair_runtime.serving import ServiceStatus

_CONTEXT = 200


def step_of(model: str, dtype: DtypeName, width: int, batch: int, *, lean: bool) -> Callable[[], object]:
    """One step of `batch` sessions behind a prompt."""
    config = ModelConfig(
        model=model, dtype=dtype, device="cpu", slots=batch, max_length=1024, threads=1, compile="off", lean=lean
    )
    runner = load_serving_model(config, [width], ServiceStatus()).runner
    draw = torch.Generator().manual_seed(1)
    for slot in range(batch):
        runner.prefill(slot, torch.randint(0, runner.vocabulary, (_CONTEXT,), generator=draw).tolist(), 0)
    rows = torch.randint(0, runner.vocabulary, (batch, width), generator=draw)
    starts, length = torch.full((batch,), _CONTEXT), runner.bucket(_CONTEXT, width)
    return lambda: runner.logits(0, rows, starts, length)


def in_turns(steps: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each."""
    taken: list[list[float]] = [[] for _ in steps]
    for repeat in range(repeats + 5):
        for step, times in zip(steps, taken, strict=True):
            began = time.perf_counter()
            step()
            if repeat >= 5:
                times.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(times) for times in taken]


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"))
    parser.add_argument("--width", type=int, default=8, metavar="W", help="rows per session")
    parser.add_argument("--sessions", nargs="+", type=int, default=(1, 4, 8), metavar="N")
    parser.add_argument("--repeats", type=int, default=40, metavar="N")
    parser.add_argument("--json", type=Path, default=Path("bench/results/lean_step.json"), metavar="PATH")
    given = parser.parse_args()
    table = Table("model", "dtype", "sessions", "own ms", "lean ms", "ratio")
    rows: list[dict[str, object]] = []
    facts, other = machine(pin(1)), OtherWork()
    for model in given.models:
        for dtype in given.dtypes:
            for sessions in given.sessions:
                steps = [step_of(model, dtype, given.width, sessions, lean=lean) for lean in (False, True)]
                own, lean = in_turns(steps, given.repeats)
                rows.append({"model": model, "dtype": dtype, "sessions": sessions, "own_ms": own, "lean_ms": lean})
                table.add_row(model, dtype, str(sessions), f"{own:.2f}", f"{lean:.2f}", f"{own / lean:.2f}")
    Console().print(table)
    facts |= {"cores_busy_with_other_work": other.cores()}
    write_report(given.json, {"width": given.width, "context": _CONTEXT, "steps": rows}, facts)


if __name__ == "__main__":
    main()
