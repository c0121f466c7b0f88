"""`specpair bench`: sweeps over running services, printed, written and plotted."""

from __future__ import annotations

import asyncio
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import specpair
from specpair.bench import sweeps
from specpair.bench.comparison import Comparison, compare
from specpair.bench.costs import draft_token_seconds
from specpair.bench.prompts import cut, read_texts, tokenized
from specpair.bench.sweeps import Bench, Sweep, run_sweep
from specpair.bench.tables import comparison_table, sweep_table
from specpair.client import ClientOptions, SpeculativeClient
from specpair.credentials import Credentials
from specpair.errors import InternalError, InvalidRequestError
from specpair.grpc_transports import GrpcDraft
from specpair.messages import ModelInfo
from specpair.params import SamplingParams
from specpair.rendering import status, stderr, stdout

__all__ = ["Options", "Outcome", "numbers", "plot", "report", "rounded", "run", "run_sweeps"]

# Rows of context behind which the cost of a draft token is measured.
_COST_CONTEXT = 128
_MISSING_PLOTS = "no plots: they need the extra bench: pip install 'specpair[bench]'"


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured."""

    target: str
    draft: str
    sweeps: tuple[str, ...] = sweeps.NAMES
    prompts: Path | None = None
    """A JSON list of texts, or of objects with a "text"."""
    prompt_count: int = 3
    max_new_tokens: int = 64
    repeats: int = 3
    sessions: tuple[int, ...] = Bench.sessions
    contexts: tuple[int, ...] = Bench.contexts
    temperatures: tuple[float, ...] = Bench.temperatures
    delays: tuple[float, ...] = Bench.delays
    """Milliseconds of a round trip."""
    output: Path | None = None
    """A directory for bench.json and the plots."""
    as_json: bool = False
    credentials: Credentials | None = None
    """For the target."""
    draft_credentials: Credentials | None = None
    """For the draft; None: the target's."""

    @property
    def access(self) -> ClientOptions:
        """How clients get in."""
        return {"credentials": self.credentials, "draft_credentials": self.draft_credentials}


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    sweeps: tuple[Sweep, ...]
    comparisons: tuple[Comparison, ...]
    draft_token_ms: float | None
    target: ModelInfo
    draft: ModelInfo | None

    @property
    def differences(self) -> list[str]:
        """Where tokens differ that must not."""
        return [line for sweep in self.sweeps for line in sweep.differences]


def run(options: Options) -> None:
    """Measures, prints and writes.

    Raises InternalError when tokens differ that must not, InvalidRequestError for options that cannot be used, and what
    the services raise.
    """
    if unknown := [name for name in options.sweeps if name not in sweeps.NAMES]:
        known = ", ".join(sweeps.NAMES)
        raise InvalidRequestError(f"no sweep is called {unknown[0]!r}; there are {known}", field="sweeps")
    with status("connecting") as tell:
        outcome = asyncio.run(run_sweeps(options, tell))
    if options.as_json:
        print(json.dumps(report(options, outcome)))
    else:
        _print(outcome)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report(options, outcome), indent=2)
        (options.output / "bench.json").write_text(text + "\n", encoding="utf-8")
        stderr.print(plot(outcome, options.output))
    if outcome.differences:
        raise InternalError("; ".join(outcome.differences))


async def run_sweeps(options: Options, progress: Callable[[str], None]) -> Outcome:
    """Measures, without a word."""
    async with SpeculativeClient(options.target, options.draft, **options.access) as client:
        target, draft = await client.info()
        prompts = await tokenized(client, read_texts(options.prompts, options.prompt_count))
    bench = Bench(
        target=options.target,
        draft=options.draft,
        prompts=prompts,
        params=SamplingParams(max_new_tokens=options.max_new_tokens, ignore_eos=True),
        repeats=options.repeats,
        verify_width=target.verify_width,
        slots=min(target.slots, draft.slots) if draft and draft.slots else target.slots,
        max_length=target.max_length,
        progress=progress,
        sessions=options.sessions,
        contexts=options.contexts,
        temperatures=options.temperatures,
        delays=options.delays,
        access=options.access,
    )
    done = []
    for name in options.sweeps:
        done.append(await run_sweep(name, replace(bench, progress=partial(_within, progress, name))))
    seconds: float | None = None
    comparisons: tuple[Comparison, ...] = ()
    lengths = next((sweep for sweep in done if sweep.name == "draft-length"), None)
    if lengths is not None and draft is not None and target.verify_width > 2:
        progress("the cost of a draft token")
        seconds = await _draft_token_seconds(options, prompts, target)
        comparisons = compare(lengths, seconds)
    return Outcome(tuple(done), comparisons, 1e3 * seconds if seconds is not None else None, target, draft)


def report(options: Options, outcome: Outcome) -> dict[str, object]:
    """The outcome as JSON has it."""
    told = asdict(options) | {"prompts": options.prompts.name if options.prompts else None}
    for unspoken in ("output", "as_json", "credentials", "draft_credentials"):
        del told[unspoken]
    return {
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "versions": {"python": platform.python_version(), "specpair": specpair.__version__},
        "options": told,
        "target": _about(outcome.target),
        "draft": _about(outcome.draft) if outcome.draft else None,
        "draft_token_ms": outcome.draft_token_ms,
        "sweeps": {sweep.name: rounded(asdict(sweep)) for sweep in outcome.sweeps},
        "theory": [rounded({**asdict(one), "ratio": one.ratio}) for one in outcome.comparisons],
        "differences": outcome.differences,
    }


def numbers(text: str, field: str) -> tuple[float, ...]:
    """The numbers of an option such as 0,5,20. Raises InvalidRequestError that names the field."""
    try:
        found = tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise InvalidRequestError(f"{text!r} is not a list of numbers, like 0,5,20", field=field) from None
    if not found or min(found) < 0:
        raise InvalidRequestError(f"{text!r} must name numbers from 0 on", field=field)
    return found


def _within(progress: Callable[[str], None], sweep: str, line: str) -> None:
    progress(f"{sweep}: {line}")


async def _draft_token_seconds(options: Options, prompts: Sequence[tuple[int, ...]], target: ModelInfo) -> float:
    draft = GrpcDraft(options.draft.removeprefix("auto:"), options.draft_credentials or options.credentials)
    vocabulary = target.fingerprint.vocabulary_size if target.fingerprint else 2
    try:
        context = cut(prompts[:1], _COST_CONTEXT)[0]
        return await draft_token_seconds(draft, context, vocabulary, longest=target.verify_width - 1)
    finally:
        await draft.close()


def _print(outcome: Outcome) -> None:
    for sweep in outcome.sweeps:
        stdout.print(sweep_table(sweep))
        for line in sweep.skipped:
            stdout.print(f"skipped: {line}")
    if outcome.comparisons:
        stdout.print(comparison_table(outcome.comparisons))
        if outcome.draft_token_ms is not None:
            stdout.print(f"a draft token takes {outcome.draft_token_ms:.2f} ms")


def plot(outcome: Outcome, directory: Path) -> str:
    """What was plotted, or why nothing was."""
    try:
        from specpair.bench import plots
    except ModuleNotFoundError as missing:
        if not (missing.name or "").startswith("matplotlib"):
            raise
        return _MISSING_PLOTS
    done = [plots.plot_sweep(sweep, directory) for sweep in outcome.sweeps]
    if outcome.comparisons:
        done.append(plots.plot_comparison(outcome.comparisons, directory))
    return "plotted: " + ", ".join(path.name for path in done)


def _about(info: ModelInfo) -> dict[str, object]:
    """What runs there, without where it lies."""
    return {**asdict(info), "model": Path(info.model).name}


def rounded(value: object) -> object:
    """Five decimals are enough."""
    match value:
        case float():
            return round(value, 5)
        case dict():
            return {key: rounded(inner) for key, inner in value.items()}
        case list() | tuple():
            return [rounded(inner) for inner in value]
    return value
