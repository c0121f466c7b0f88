"""Many sessions at a time, and long contexts: `python bench/sessions.py`.

Two questions, both put to the services as users run them:

* sessions: tokens per second of 1 to 16 clients at once, and how long each waits for a token, with the target alone and
  with the pair; and how much a long prompt that arrives meanwhile holds the others back;
* context: milliseconds per token by positions in use and by the size of the cache.

Settings take turns, repeat by repeat. Prints tables and writes JSON to bench/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from report import OtherWork, machine, pin, write_report
from specpair import SamplingParams, SpeculativeClient
from specpair.services import started

_MODES = ("alone", "pair")


@dataclass(frozen=True)
class Options:
    """What is measured; defaults are those of the published figures."""

    models: Path = Path("models/demo")
    dtype: str = "bf16"
    sessions: tuple[int, ...] = (1, 2, 4, 8, 16)
    modes: tuple[str, ...] = _MODES
    prompt_tokens: int = 128
    new_tokens: int = 96
    long_prompt: int = 900
    caches: tuple[int, ...] = (512, 1024, 2048, 4096)
    contexts: tuple[int, ...] = (128, 256, 384, 512, 1024, 2048, 4096)
    context_tokens: int = 24
    repeats: int = 5
    threads: int = 1
    target_options: str = ""
    draft_options: str = ""


@dataclass
class Heard:
    """When a session's tokens came: milliseconds to the first, and for each other one since the one before.

    Tokens that come together share the time since the tokens before them.
    """

    first_ms: float = 0.0
    gaps_ms: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True)
class Load:
    """Figures of so many sessions at once: medians over the repeats, gaps over all tokens of all repeats."""

    mode: str
    sessions: int
    tokens_per_second: float
    times_one_session: float
    gap_p50_ms: float
    gap_p99_ms: float
    longest_gap_ms: float
    first_token_ms: float
    disturbed: bool
    """Whether a long prompt arrived meanwhile."""


@contextmanager
def _services(options: Options, *, slots: int, max_length: int, draft: bool) -> Iterator[tuple[str, str]]:
    """Addresses of a target and of a draft, both warm. Without `draft` that one only looks prompts up."""
    common = [f"--threads={options.threads}", f"--slots={slots}", "--log-format=console"]
    length = f"--max-length={max_length}"
    target = [f"--model={options.models / 'target'}", f"--dtype={options.dtype}", length, *common]
    model = [f"--model={options.models / 'draft'}", f"--dtype={options.dtype}", length]
    proposer = [*(model if draft else ["--proposer=ngram"]), *common]
    with started(
        [*target, *shlex.split(options.target_options)], [*proposer, *shlex.split(options.draft_options)]
    ) as services:
        asyncio.run(_wait(services))
        yield services[0].address, services[1].address


async def _wait(services: Sequence[object]) -> None:
    for service in services:
        await service.wait(lambda *_: None)  # type: ignore[attr-defined]


async def _prompts(client: SpeculativeClient, options: Options, count: int) -> list[list[int]]:
    """So many different prompts of held-out text, cut to the same length."""
    lines = (options.models / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    texts = itertools.cycle([json.loads(line)["text"] for line in lines])
    ids: list[int] = []
    while len(ids) < count * options.prompt_tokens:
        ids += await client.tokenize(next(texts))
    return [ids[start * options.prompt_tokens :][: options.prompt_tokens] for start in range(count)]


async def _session(client: SpeculativeClient, prompt: Sequence[int], count: int) -> Heard:
    heard = Heard()
    last = time.perf_counter()
    async for chunk in client.stream(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True)):
        now, tokens = time.perf_counter(), len(chunk.tokens)
        if tokens and not heard.tokens:
            heard.first_ms = 1e3 * (now - last)
        elif tokens:
            heard.gaps_ms += [1e3 * (now - last) / tokens] * tokens
        heard.tokens += tokens
        last = now if tokens else last
    return heard


async def _load(
    client: SpeculativeClient, prompts: Sequence[Sequence[int]], options: Options, long: Sequence[int] = ()
) -> tuple[float, list[Heard]]:
    """Tokens per second of a session per prompt, all at once, and what each heard; `long` arrives under way."""

    async def disturb() -> None:
        await asyncio.sleep(0.2)
        await _session(client, long, 1)

    began = time.perf_counter()
    others = asyncio.create_task(disturb()) if long else None
    heard = await asyncio.gather(*(_session(client, prompt, options.new_tokens) for prompt in prompts))
    seconds = time.perf_counter() - began
    if others is not None:
        await others
    return sum(one.tokens for one in heard) / seconds, heard


async def measure_sessions(options: Options, target: str, draft: str) -> list[Load]:
    """Every number of sessions in every mode, in turns."""
    settings = [
        (mode, count, disturbed)
        for mode in options.modes
        for count in options.sessions
        for disturbed in (False, True)
        if not disturbed or (count in (1, 4, 8) and options.long_prompt)
    ]
    rates: dict[tuple[str, int, bool], list[float]] = {setting: [] for setting in settings}
    everything: dict[tuple[str, int, bool], list[Heard]] = {setting: [] for setting in settings}
    clients = {"alone": SpeculativeClient(target, "none"), "pair": SpeculativeClient(target, draft)}
    try:
        prompts = await _prompts(clients["alone"], options, max(options.sessions))
        long = (list(itertools.chain(*prompts)) * (1 + options.long_prompt // options.prompt_tokens))[
            : options.long_prompt
        ]
        for mode in options.modes:
            await _load(clients[mode], prompts[:1], options)
        for _ in range(options.repeats):
            for setting in settings:
                mode, count, disturbed = setting
                rate, heard = await _load(clients[mode], prompts[:count], options, long if disturbed else ())
                rates[setting].append(rate)
                everything[setting] += heard
    finally:
        for client in clients.values():
            await client.aclose()
    return [_summary(setting, rates, everything[setting]) for setting in settings]


def _summary(
    setting: tuple[str, int, bool], rates: dict[tuple[str, int, bool], list[float]], heard: Sequence[Heard]
) -> Load:
    mode, count, disturbed = setting
    gaps = sorted(itertools.chain.from_iterable(one.gaps_ms for one in heard))
    rate = statistics.median(rates[setting])
    one = rates.get((mode, 1, False))
    return Load(
        mode=mode,
        sessions=count,
        tokens_per_second=round(rate, 1),
        times_one_session=round(rate / statistics.median(one), 2) if one else 0.0,
        gap_p50_ms=round(gaps[len(gaps) // 2], 2),
        gap_p99_ms=round(gaps[int(0.99 * (len(gaps) - 1))], 2),
        longest_gap_ms=round(gaps[-1], 2),
        first_token_ms=round(statistics.median(one.first_ms for one in heard), 1),
        disturbed=disturbed,
    )


async def measure_context(options: Options, target: str, cache: int) -> dict[int, list[float]]:
    """Milliseconds per token behind so many positions, by positions in use; contexts that do not fit are left out."""
    client = SpeculativeClient(target, "none")
    try:
        room = (await client.info())[0].max_length
        if room < cache:
            return {}
        prompts = await _prompts(client, options, 1)
        long = (prompts[0] * (1 + room // len(prompts[0])))[:room]
        found: dict[int, list[float]] = {}
        fitting = [context for context in options.contexts if context <= room]
        for _ in range(options.repeats):
            for context in fitting:
                # The last tokens stand just before the named position, in its own attended length.
                prompt = long[: context - options.context_tokens - 1]
                heard = await _session(client, prompt, options.context_tokens)
                found.setdefault(context, []).append(statistics.median(heard.gaps_ms))
        return found
    finally:
        await client.aclose()


def _options() -> tuple[Options, int, Path, set[str]]:
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=default.models, help="directory with target/ and draft/")
    parser.add_argument("--dtype", default=default.dtype)
    parser.add_argument("--sessions", type=int, nargs="+", default=default.sessions)
    parser.add_argument("--modes", nargs="+", choices=_MODES, default=default.modes)
    parser.add_argument("--prompt-tokens", type=int, default=default.prompt_tokens)
    parser.add_argument("--new-tokens", type=int, default=default.new_tokens)
    parser.add_argument("--long-prompt", type=int, default=default.long_prompt, help="0: no disturbance is measured")
    parser.add_argument("--caches", type=int, nargs="+", default=default.caches)
    parser.add_argument("--contexts", type=int, nargs="+", default=default.contexts)
    parser.add_argument("--repeats", type=int, default=default.repeats)
    parser.add_argument("--threads", type=int, default=default.threads, help="of each service")
    parser.add_argument("--target-options", default="", help="more flags for the target")
    parser.add_argument("--draft-options", default="", help="more flags for the draft")
    parser.add_argument("--cores", type=int, default=2, help="cores that everything runs on")
    parser.add_argument("--parts", nargs="+", choices=("sessions", "context"), default=("sessions", "context"))
    parser.add_argument("--output", type=Path, default=Path("bench/results/sessions.json"))
    said = vars(parser.parse_args())
    cores, output, parts = said.pop("cores"), said.pop("output"), set(said.pop("parts"))
    said = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    return Options(**said), cores, output, parts


def main() -> None:
    """Measures and writes the report."""
    options, count, output, parts = _options()
    cores = pin(count)
    facts, noise = machine(cores), OtherWork()
    figures: dict[str, object] = {"options": {**asdict(options), "models": options.models.name}}
    if "sessions" in parts:
        room = max(options.prompt_tokens + options.new_tokens, options.long_prompt) + 8
        with _services(
            options, slots=max(options.sessions) + 1, max_length=room, draft="pair" in options.modes
        ) as addresses:
            loads = asyncio.run(measure_sessions(options, *addresses))
        for load in loads:
            print(
                f"{load.mode:6} {load.sessions:3} sessions{' + prompt' if load.disturbed else '':9}"
                f"{load.tokens_per_second:8.1f} tokens/s  x{load.times_one_session:<5.2f} ms per token p50"
                f"{load.gap_p50_ms:7.2f} p99{load.gap_p99_ms:8.2f} longest{load.longest_gap_ms:8.2f}"
                f"  first token{load.first_token_ms:8.1f} ms"
            )
        figures["sessions"] = [asdict(load) for load in loads]
    if "context" in parts:
        table = {}
        for cache in options.caches:
            with _services(options, slots=1, max_length=cache, draft=False) as (target, _):
                found = asyncio.run(measure_context(options, target, cache))
            table[cache] = {context: round(statistics.median(times), 3) for context, times in found.items()}
            for context, milliseconds in table[cache].items():
                print(f"cache {cache:5}  in use {context:5}  {milliseconds:7.2f} ms per token")
        figures["context_ms_per_token"] = table
    figures["cores_busy_with_other_work"] = noise.cores()
    write_report(output, figures, facts)


if __name__ == "__main__":
    main()
