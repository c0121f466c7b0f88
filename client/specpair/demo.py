"""`specpair demo`: both services on this machine, at work together, compared with the target alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from rich.text import Text

from specpair.client import SpeculativeClient
from specpair.errors import InternalError, InvalidRequestError
from specpair.params import SamplingParams
from specpair.phases import showing
from specpair.rendering import StreamPrinter, legend, status, stdout, summary
from specpair.results import Result
from specpair.services import Service, started

__all__ = ["Options", "run"]

# Prompts that are streamed before anything is timed, and how: small models repeat themselves when they are greedy.
_SHOWN = 3
_SHOWN_SAMPLING = SamplingParams(temperature=0.8, top_p=0.9, seed=1)


@dataclass(frozen=True, slots=True)
class Options:
    """What to show, and how long to measure."""

    models: Path | None
    max_new_tokens: int
    repeats: int
    prompts: int
    dtype: str | None
    threads: int | None
    as_json: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A held-out prompt."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same generations by the pair and by the target alone, in turns."""

    alone: list[Result]
    pair: list[Result]

    @property
    def alone_speed(self) -> float:
        """Median tokens per second."""
        return statistics.median(result.stats.tokens_per_second for result in self.alone)

    @property
    def pair_speed(self) -> float:
        """Median tokens per second."""
        return statistics.median(result.stats.tokens_per_second for result in self.pair)

    @property
    def speedup(self) -> float:
        """Median over the generations of pair over alone, each measured one right after the other."""
        return statistics.median(
            pair.stats.tokens_per_second / alone.stats.tokens_per_second
            for pair, alone in zip(self.pair, self.alone, strict=True)
        )

    @property
    def acceptance_rate(self) -> float:
        """Accepted per proposed token."""
        proposed = sum(result.stats.proposed for result in self.pair)
        return sum(result.stats.accepted for result in self.pair) / proposed if proposed else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens per step of the target."""
        return sum(r.stats.output_tokens for r in self.pair) / sum(r.stats.rounds for r in self.pair)

    @property
    def identical(self) -> bool:
        """Whether both sides produced the same tokens, every time."""
        return all(pair.token_ids == alone.token_ids for pair, alone in zip(self.pair, self.alone, strict=True))


def run(options: Options) -> None:
    """Runs the demonstration; both services have stopped when it returns or raises.

    Raises InvalidRequestError if there are no models, ModelLoadError if a service does not start, and InternalError if
    the tokens of the pair are not those of the target alone.
    """
    models = _find_models(options.models)
    examples = _read_prompts(models / "prompts.json")
    flags = [*_common_flags(options), "--log-format", "console"]
    target_flags = ["--model", str(models / "target"), *flags]
    # A draft's numbers are advice, and on a CPU fp32 computes a step of a small model faster than bf16.
    draft_flags = ["--model", str(models / "draft"), *flags, *([] if options.dtype else ["--dtype", "fp32"])]
    with _interrupted_by_sigterm(), started(target_flags, draft_flags) as (target, draft):
        asyncio.run(_demonstrate(options, examples, target, draft))


async def _demonstrate(options: Options, examples: Sequence[Example], target: Service, draft: Service) -> None:
    with showing(lines=False) as show:
        await asyncio.gather(*(service.wait(show) for service in (target, draft)))
    async with SpeculativeClient(target.address, "none") as alone, SpeculativeClient(
        target.address, draft.address
    ) as pair:  # fmt: skip
        params = SamplingParams(max_new_tokens=options.max_new_tokens)
        for client in (alone, pair):  # the first generation pays for connections and caches
            await client.generate(examples[0].text, params)
        if not options.as_json:
            shown = replace(_SHOWN_SAMPLING, max_new_tokens=options.max_new_tokens)
            await _show(pair, shown, examples[:_SHOWN])
        comparison = await _compare(alone, pair, params, examples[: options.prompts], options)
    _report(comparison, options, min(options.prompts, len(examples)))
    if not comparison.identical:
        raise InternalError("the pair's tokens differ from those of the target alone")


async def _show(client: SpeculativeClient, params: SamplingParams, examples: Sequence[Example]) -> None:
    stdout.print(
        Text(
            "Two processes continue Python code that neither model was trained on, "
            f"sampled with temperature {params.temperature}, top_p {params.top_p}, seed {params.seed}.",
            "bold",
        )
    )
    stdout.print(legend())
    for example in examples:
        stdout.print(Text(f"\n── {example.name} ", "bold"))
        stdout.print(Text(example.text, "dim"), end="")
        printer = StreamPrinter(stdout)
        async with client.stream(example.text, params) as stream:
            async for chunk in stream:
                printer.show(chunk)
        printer.end()
        stdout.print(Text(summary(stream.result.stats), "dim"))


async def _compare(
    alone: SpeculativeClient,
    pair: SpeculativeClient,
    params: SamplingParams,
    examples: Sequence[Example],
    options: Options,
) -> Comparison:
    """Alone, pair, alone, pair: what else happens on the machine happens to both."""
    comparison = Comparison([], [])
    with status("measuring") as tell:
        for repeat in range(options.repeats):
            for example in examples:
                tell(f"measuring: run {repeat + 1} of {options.repeats}, {example.name}")
                comparison.alone.append(await alone.generate(example.text, params))
                comparison.pair.append(await pair.generate(example.text, params))
    return comparison


def _report(comparison: Comparison, options: Options, prompts: int) -> None:
    if options.as_json:
        figures = {
            "speedup": comparison.speedup,
            "acceptance_rate": comparison.acceptance_rate,
            "target_alone_tokens_per_second": comparison.alone_speed,
            "pair_tokens_per_second": comparison.pair_speed,
            "tokens_per_round": comparison.tokens_per_round,
            "tokens_identical": comparison.identical,
            "prompts": prompts,
            "repeats": options.repeats,
            "runs": len(comparison.pair),
            "max_new_tokens": options.max_new_tokens,
        }
        print(json.dumps(figures))
        return
    stdout.print(
        Text(f"\nMeasured just now: greedy, {prompts} prompts, {options.repeats} times each, medians:", "bold")
    )
    stdout.print(f"  target alone   {comparison.alone_speed:7.1f} tokens/s")
    stdout.print(f"  the pair       {comparison.pair_speed:7.1f} tokens/s   {comparison.speedup:.2f} times as fast")
    stdout.print(
        f"  acceptance     {comparison.acceptance_rate:7.1%} of the proposed tokens, "
        f"{comparison.tokens_per_round:.2f} tokens per step of the target"
    )
    stdout.print(
        f"  tokens         {'identical' if comparison.identical else 'NOT IDENTICAL'} in {len(comparison.pair)} runs"
    )


def _common_flags(options: Options) -> list[str]:
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // 2)
    flags = ["--threads", str(threads), "--slots", "2"]
    return [*flags, "--dtype", options.dtype] if options.dtype else flags


def _find_models(given: Path | None) -> Path:
    """The directory with the demo pair: as told, else models/demo from here, else from the source tree."""
    source = Path(__file__).resolve().parents[2] / "models" / "demo"
    candidates = [given] if given is not None else [Path("models/demo"), source]
    for directory in candidates:
        if all((directory / part).exists() for part in ("target", "draft", "prompts.json")):
            return directory
    raise InvalidRequestError(
        f"no target/, draft/ and prompts.json in {' or '.join(str(directory) for directory in candidates)}",
        field="models",
    )


def _read_prompts(path: Path) -> list[Example]:
    try:
        examples = [Example(entry["name"], entry["text"]) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidRequestError(f"{path} is not a list of prompts: {error}", field="models") from None
    if not examples:
        raise InvalidRequestError(f"{path} has no prompts", field="models")
    return examples


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, so that calls and services are ended; the exit code is its own."""
    came = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        # An event loop has put a handler of its own there, which cancels what it runs: to raise in its midst would not.
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if not came:
            raise
        sys.exit(128 + signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
