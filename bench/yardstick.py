"""Other runtimes' loops and specpair's on the same weights, prompts and cores: `python bench/yardstick.py`.

Measures in one run, in turns: transformers' `generate` plain, with a static cache, compiled, assisted by the draft and
with prompt lookup; llama.cpp and OpenVINO GenAI, alone and with the draft, where they are installed; and specpair's
target alone, with n-gram and with the draft service, through the real services. Greedy, end of sequence ignored. Prints
a table, writes JSON to bench/results/, and ends with code 1 where tokens differ that must not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import transformers
from rich.console import Console
from rich.table import Table

import llama_loops
import openvino_loops
import specpair_loops
import transformers_loops
from conversions import PeerError
from measuring import ALONE, GENERATE, SPECPAIR, Loop, Runs, Summary, agreement, differences, measure, summarize
from report import OtherWork, machine, pin, relative, write_report

_NAMES = (*transformers_loops.NAMES, *llama_loops.NAMES, *openvino_loops.NAMES, *specpair_loops.NAMES)
_COMPILED = "generate-compiled"
# Warm-up runs of each prompt for what compiles: the second may compile again, with dynamic shapes.
_WARM_UPS = 2


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    models: Path
    loops: tuple[str, ...]
    compile: bool
    dtype: str
    device: str
    max_new_tokens: int
    prompts: int
    prompt_length: int | None
    repeats: int
    assistant_tokens: int
    draft_length: int | None
    cores: int
    threads: int
    target_threads: int
    draft_threads: int
    target_options: str
    draft_options: str
    llama: llama_loops.LlamaTools
    openvino_python: Path | None
    json: Path
    remarks: tuple[str, ...]

    @property
    def chosen(self) -> tuple[str, ...]:
        """The loops that are going to run."""
        return tuple(name for name in self.loops if name != _COMPILED or self.compile)

    @property
    def skipped(self) -> tuple[str, ...]:
        """A message for each loop that is not."""
        reason = "skipped: compiling on a CPU takes minutes; --compile runs it"
        return tuple(f"{name}: {reason}" for name in self.loops if name not in self.chosen)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from a command line; None takes the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", type=Path, default=Path("models/demo"), metavar="DIR", help="has target/ and draft/")
    add("--loops", nargs="+", choices=_NAMES, default=_NAMES, help="what to measure; default: everything")
    add("--compile", action=argparse.BooleanOptionalAction, help=f"run {_COMPILED}; default: not on a CPU")
    add("--dtype", choices=("bf16", "fp32"), default="bf16")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--max-new-tokens", type=_positive, default=96, metavar="N")
    add("--prompts", type=_positive, default=5, metavar="N", help="how many of DIR/prompts.json")
    add("--prompt-length", type=_positive, metavar="N", help="prompts of N random ids instead")
    add("--repeats", type=_positive, default=5, metavar="N")
    add("--assistant-tokens", type=_positive, default=5, metavar="K", help="transformers: proposals per round")
    add("--draft-length", type=int, metavar="K", help="specpair: proposals per round; default: as it paces itself")
    add("--cores", type=_positive, default=2, metavar="N", help="both sides run on the same N cores")
    add("--threads", type=_positive, metavar="N", help="transformers' threads; default: one per core")
    add("--target-threads", type=_positive, metavar="N", help="the target service's; default: half of the cores")
    add("--draft-threads", type=_positive, metavar="N", help="the draft service's; default: half of the cores")
    add("--target-options", default="", metavar="FLAGS", help="more flags for the target service")
    add("--draft-options", default="", metavar="FLAGS", help="more flags for the draft service")
    add("--llama-dir", type=Path, metavar="DIR", help="has llama-server; default: PATH")
    add("--llama-source", type=Path, metavar="DIR", help="llama.cpp's sources, whose converter is needed once a model")
    add("--llama-python", type=Path, metavar="PATH", help="an interpreter that can run it; default: this one")
    add("--openvino-python", type=Path, metavar="PATH", help="an interpreter with openvino-genai and optimum-intel")
    add("--json", type=Path, metavar="PATH", help="default: bench/results/yardstick_DTYPE.json")
    add("--remarks", nargs="+", default=(), help="goes into the JSON")
    given = vars(parser.parse_args(arguments))
    if given["compile"] is None:
        given["compile"] = not given["device"].startswith("cpu")
    given["threads"] = given["threads"] or given["cores"]
    for service in ("target_threads", "draft_threads"):  # as `specpair demo` does
        given[service] = given[service] or max(1, given["cores"] // 2)
    given["json"] = given["json"] or Path(f"bench/results/yardstick_{given['dtype']}.json")
    given["llama"] = llama_loops.LlamaTools(
        _whole(given.pop("llama_dir")),
        _whole(given.pop("llama_source")),
        _whole(given.pop("llama_python")) or Path(sys.executable),
    )
    given["openvino_python"] = _whole(given["openvino_python"])
    # Always in the order of the table.
    given["loops"] = tuple(name for name in _NAMES if name in given["loops"])
    return Options(**{**given, "remarks": tuple(given["remarks"])})


def read_prompts(options: Options) -> list[list[int]]:
    """Token ids of the prompts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.models / "target")
    if options.prompt_length is not None:
        draw = random.Random(1)
        return [draw.choices(range(len(tokenizer)), k=options.prompt_length) for _ in range(options.prompts)]
    entries = json.loads((options.models / "prompts.json").read_text(encoding="utf-8"))
    return [tokenizer(entry["text"])["input_ids"] for entry in entries[: options.prompts]]


def warm_up(loops: Sequence[Loop], prompts: Sequence[Sequence[int]]) -> tuple[list[Loop], list[str]]:
    """The first call of a loop pays for connections and buffers, and what compiles does so for every new shape.

    Returns the loops that work, and a message for each peer that does not.
    """
    # The longest first: transformers keeps the largest static cache it once needed.
    ordered = sorted(prompts, key=len, reverse=True)
    working, skipped = [], []
    for loop in loops:
        try:
            for prompt in ordered * _WARM_UPS if loop.name == _COMPILED else ordered[:1]:
                loop.run(prompt)
        except PeerError as unable:
            skipped.append(f"{loop.name}: skipped: {unable}")
        else:
            working.append(loop)
    return working, skipped


def ratios(summaries: Sequence[Summary]) -> dict[str, dict[str, float]]:
    """By loop: its speed over that of plain `generate` and over that of specpair's target alone, where measured."""
    speeds = {summary.loop: summary.tokens_per_second for summary in summaries}
    return {
        name: {f"to_{base}": speed / speeds[base] for base in (GENERATE, ALONE) if base in speeds}
        for name, speed in speeds.items()
    }


def table(summaries: Sequence[Summary], agreements: Mapping[str, Mapping[str, float]]) -> Table:
    """What is printed."""
    result = Table(title="tokens per second, medians; the whole call, prompt included", title_justify="left")
    result.add_column("loop", no_wrap=True)
    for heading in ("tokens/s", "slowest–fastest", "× generate", "× alone", "accepted", "tokens/round", "equal"):
        result.add_column(heading, justify="right", no_wrap=True)
    by_loop = ratios(summaries)
    for one in summaries:
        ratio, same = by_loop[one.loop], agreements.get(one.loop, {})
        result.add_row(
            one.loop,
            f"{one.tokens_per_second:.1f}",
            f"{one.slowest:.1f}–{one.fastest:.1f}",
            _figure(ratio.get(f"to_{GENERATE}"), ".2f"),
            _figure(ratio.get(f"to_{ALONE}"), ".2f"),
            _figure(one.acceptance, ".0%"),
            f"{one.tokens_per_round:.2f}",
            _figure(same.get("prompts_equal"), ".0%"),
        )
    return result


def figures(summaries: Sequence[Summary], runs: Mapping[str, Runs]) -> dict[str, object]:
    """What the JSON has for each loop, seconds of every run included."""
    by_loop, agreements = ratios(summaries), agreement_with_generate(runs)
    return {
        one.loop: _rounded(
            {
                **asdict(one),
                "ratio": by_loop[one.loop],
                "agreement_with_generate": agreements.get(one.loop),
                "seconds": [[run.seconds for run in one_pass] for one_pass in runs[one.loop]],
            }
        )
        for one in summaries
    }


def agreement_with_generate(runs: Mapping[str, Runs]) -> dict[str, dict[str, float]]:
    """By loop, how far its tokens are those of plain `generate`; empty if that was not measured."""
    if GENERATE not in runs:
        return {}
    return {name: agreement(runs[GENERATE][0], passes[0]) for name, passes in runs.items()}


def main() -> None:
    """Measures, prints and writes."""
    options = parse()
    signal.signal(signal.SIGTERM, _terminated)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cores = pin(options.cores)
    torch.set_num_threads(options.threads)
    facts = {"machine": machine(cores, options.device), "options": _plain(options)}
    # A file takes the whole table.
    stdout, stderr = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    prompts, other = read_prompts(options), OtherWork()
    with contextlib.ExitStack() as stack, stderr.status("loading") as status:
        loops, unable = _loops(options, stack, status.update)
        status.update("warming up")
        loops, failing = warm_up(loops, prompts)
        runs = measure(loops, prompts, options.repeats, status.update)
    summaries = [summarize(loop, runs[loop.name]) for loop in loops]
    wrong = differences(runs, exact=options.dtype == "fp32")
    stdout.print(table(summaries, agreement_with_generate(runs)))
    skipped = (*options.skipped, *unable, *failing)
    for line in skipped:
        stdout.print(line)
    measured = {
        "cores_busy_with_other_work": other.cores(),
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "loops": figures(summaries, runs),
        "differences": wrong,
        "skipped": skipped,
        "remarks": options.remarks,
    }
    write_report(options.json, measured, facts)
    if wrong:
        sys.exit("\n".join(wrong))


def _loops(
    options: Options, stack: contextlib.ExitStack, progress: Callable[[str], None]
) -> tuple[list[Loop], list[str]]:
    """The chosen loops, and a message for each peer that is not there; services run until the stack unwinds."""
    loops: list[Loop] = []
    if theirs := [name for name in options.chosen if name in transformers_loops.NAMES]:
        loops += transformers_loops.load_loops(
            options.models,
            theirs,
            dtype=options.dtype,
            device=options.device,
            max_new_tokens=options.max_new_tokens,
            draft_length=options.assistant_tokens,
        )
    peers, skipped = _peers(options, stack, progress)
    loops += peers
    if ours := [name for name in options.chosen if name.startswith(SPECPAIR)]:
        settings = specpair_loops.ServiceSettings(
            models=options.models,
            dtype=options.dtype,
            device=options.device,
            target_threads=options.target_threads,
            draft_threads=options.draft_threads,
            target_options=options.target_options,
            draft_options=options.draft_options,
        )
        loops += stack.enter_context(
            specpair_loops.serve_loops(
                settings,
                ours,
                max_new_tokens=options.max_new_tokens,
                draft_length=options.draft_length,
                progress=progress,
            )
        )
    return loops, skipped


def _peers(
    options: Options, stack: contextlib.ExitStack, progress: Callable[[str], None]
) -> tuple[list[Loop], list[str]]:
    """Loops of other programs. Each is optional."""
    same = {
        "dtype": options.dtype,
        "threads": options.threads,
        "max_new_tokens": options.max_new_tokens,
        "draft_length": options.assistant_tokens,
        "progress": progress,
    }
    ways = (
        (llama_loops.NAMES, partial(llama_loops.serve_loops, options.llama)),
        (openvino_loops.NAMES, partial(openvino_loops.serve_loops, options.openvino_python)),
    )
    loops: list[Loop] = []
    skipped = []
    for known, serve in ways:
        if names := [name for name in options.chosen if name in known]:
            try:
                if options.device != "cpu":
                    raise PeerError("measured on a CPU only")
                loops += stack.enter_context(serve(options.models, names, **same))
            except (PeerError, OSError) as unable:
                skipped += [f"{name}: skipped: {unable}" for name in names]
    return loops, skipped


def _plain(options: Options) -> dict[str, object]:
    """Options as JSON can have them."""
    told = {name: relative(str(value)) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    # Said elsewhere, or by where this stands, or places of a machine.
    for name in ("remarks", "json", "llama", "openvino_python"):
        del told[name]
    return told


def _rounded(value: object) -> object:
    """Five decimals are enough for seconds."""
    match value:
        case float():
            return round(value, 5)
        case dict():
            return {key: _rounded(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_rounded(inner) for inner in value]
    return value


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _whole(path: Path | None) -> Path | None:
    """Absolute, since converters run elsewhere; links stay, which virtual environments are made of."""
    return path.absolute() if path else None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _terminated(signum: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack like Ctrl-C does, so that the services are stopped."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
