"""How long a compiled model takes to start, the first time and the second: `python bench/compile_start.py`.

Each start is a process of its own that loads a model, compiles its steps and warms up. First starts begin with an
empty directory of compiled steps, second ones with what the first has left there; the pairs take turns. Prints the
seconds by part and writes JSON to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from report import OtherWork, machine, pin, relative, write_report

# Process start, imports and interpreter included, is measured from outside; a child tells the rest.
_CHILD = """
import json, sys, time
began = time.perf_counter()
import torch
from specpair_runtime.models import serving_model
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.serving import ServiceStatus
imported = time.perf_counter()
warm_up, warming = serving_model.warm_up, 0.0
def timed(*arguments):
    global warming
    start = time.perf_counter()
    warm_up(*arguments)
    warming = time.perf_counter() - start
serving_model.warm_up = timed
options, widths = json.loads(sys.argv[1])
serving_model.load_serving_model(ModelConfig(**options), widths, ServiceStatus())
counters = torch._dynamo.utils.counters
traced = torch._dynamo.utils.compilation_time_metrics
inductor = sum(traced.get("OutputGraph.call_user_compiler", ()))
print(json.dumps({
    "imports": imported - began,
    "load": time.perf_counter() - imported - warming,
    "warm_up": warming,
    "tracing": sum(traced.get("_compile.compile_inner", ())) - inductor,
    "backend": inductor,
    "graphs": counters["stats"]["unique_graphs"],
    "reused": counters["aot_autograd"]["autograd_cache_hit"],
}))
"""


@dataclass(frozen=True)
class Options:
    """What is started."""

    model: str = "models/demo/draft"
    dtype: str = "fp32"
    quantization: str = "none"
    widths: tuple[int, ...] = (8,)
    slots: int = 1
    max_length: int = 256
    repeats: int = 3
    threads: int = 1


def start(options: Options, artifacts: str) -> dict[str, float]:
    """Seconds of one start by part: `total` and `processor` time from outside, and what the process tells."""
    config = {
        "model": options.model,
        "dtype": options.dtype,
        "quantization": options.quantization,
        "device": "cpu",
        "slots": options.slots,
        "max_length": options.max_length,
        "threads": options.threads,
        "compile": "on",
        "compile_cache": artifacts,
    }
    began, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps([config, options.widths])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )
    total, after = time.perf_counter() - began, os.times()
    # What other programs on the machine do changes this less.
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"total": total, "processor": processor, **told}


def measure(options: Options) -> dict[str, object]:
    """Medians of first and second starts by part, and their ratios."""
    runs: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="specpair-compile-") as artifacts:
            for which, starts in runs.items():
                starts.append(start(options, artifacts))
                print(f"{which} start {repeat + 1} of {options.repeats}: {starts[-1]['total']:.1f} s", file=sys.stderr)
    medians = {
        which: {part: round(statistics.median(one[part] for one in starts), 3) for part in starts[0]}
        for which, starts in runs.items()
    }
    ratios = {
        part: round(statistics.median(b[part] / a[part] for a, b in zip(*runs.values(), strict=True)), 3)
        for part in ("total", "processor", "warm_up")
    }
    return {"medians": medians, "second_over_first": ratios, "runs": runs}


def _parse() -> tuple[Options, Path]:
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=defaults.model, help="directory or hub id (%(default)s)")
    parser.add_argument("--dtype", default=defaults.dtype)
    parser.add_argument("--quantization", default=defaults.quantization)
    parser.add_argument("--widths", type=int, nargs="+", default=defaults.widths, metavar="ROWS")
    for name in ("slots", "max_length", "repeats", "threads"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name), metavar="N")
    parser.add_argument("--output", type=Path, default=Path("bench/results/compile_start.json"))
    given = vars(parser.parse_args())
    output = given.pop("output")
    return Options(**{**given, "widths": tuple(given["widths"])}), output


def main() -> None:
    """Measures, prints and writes."""
    options, output = _parse()
    cores, other = pin(options.threads), OtherWork()
    facts = machine(cores)
    figures = measure(options)
    print(json.dumps({key: figures[key] for key in ("medians", "second_over_first")}, indent=2))
    told = {**asdict(options), "model": relative(options.model)}
    write_report(output, {"options": told, "other_work_cores": other.cores(), **figures}, facts)


if __name__ == "__main__":
    main()
