"""Runs of generations in turns, and the figures that come of them.

Everything here compares what was measured side by side: cases take turns prompt by prompt, so that what else happens on
the machine happens to all of them.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from specpair.bench.theory import acceptance_per_token
from specpair.client import SpeculativeClient
from specpair.params import SamplingParams
from specpair.results import Stats

__all__ = ["Case", "Figures", "Run", "differences", "figures", "measure", "percentile"]


@dataclass(frozen=True)
class Case:
    """One way to generate, as the tables name it."""

    name: str
    client: SpeculativeClient
    prompts: Sequence[tuple[int, ...]]
    params: SamplingParams
    draft_length: int | None = None
    """Proposals in every round, where their number is fixed."""
    sessions: int = 1
    """Generations at the same time, each of another prompt as far as there are enough."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation: when its chunks came, in seconds since it began, and how many tokens each had."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    stamps: tuple[float, ...]
    sizes: tuple[int, ...]
    stats: Stats


@dataclass(frozen=True, slots=True)
class Run:
    """The generations of one case that ran at the same time."""

    seconds: float
    """Until the last of them ended."""
    generations: tuple[Generation, ...]

    @property
    def tokens(self) -> int:
        """Of all generations."""
        return sum(len(one.token_ids) for one in self.generations)


@dataclass(frozen=True)
class Figures:
    """What a case came to. Times are in milliseconds."""

    tokens_per_second: float
    """Of all sessions together, the prompt included: by prompt, over the median of the repeats."""
    slowest: float
    fastest: float
    decode_ms_per_token: float
    """Of one session, from its first chunk to its last: the sum of each prompt's median, by token."""
    first_token_ms: float
    p50_ms_per_token: float
    """A chunk's tokens share the time since the chunk before it."""
    p99_ms_per_token: float
    tokens_per_round: float
    acceptance: float | None
    """Accepted per proposed token; None without proposals."""
    acceptance_per_token: float | None
    """Chance of acceptance behind accepted ones; None unless the draft length is fixed and above 0."""
    draft_length: float
    """Proposed tokens per round, on average."""
    ms_per_round: Mapping[str, float] = field(default_factory=dict)
    """By where it went, as the client's statistics tell."""
    proposer_changes: int = 0
    """Generations in which the draft was lost: their figures are those of another proposer."""


async def measure(cases: Sequence[Case], repeats: int, progress: Callable[[str], None]) -> dict[str, list[list[Run]]]:
    """Every case on each of its prompts, `repeats` times, in turns: runs by case, repeat and prompt.

    Each turn starts with the next case. Nothing of a warm-up counts: every case runs once before.
    """
    runs: dict[str, list[list[Run]]] = {case.name: [] for case in cases}
    for case in cases:
        progress(f"warming up: {case.name}")
        await _run(case, 0)
    turn = 0
    for repeat in range(repeats):
        for name in runs:
            runs[name].append([])
        for number in range(max(len(case.prompts) for case in cases)):
            start = turn % len(cases)
            for case in (*cases[start:], *cases[:start]):
                if number < len(case.prompts):
                    progress(f"run {repeat + 1} of {repeats}, prompt {number + 1}: {case.name}")
                    runs[case.name][-1].append(await _run(case, number))
            turn += 1
    return runs


def figures(case: Case, runs: Sequence[Sequence[Run]]) -> Figures:
    """The figures of one case, from its runs by repeat and prompt."""
    by_prompt = list(zip(*runs, strict=True))
    seconds = sum(statistics.median(run.seconds for run in repeats) for repeats in by_prompt)
    passes = [sum(run.tokens for run in one) / sum(run.seconds for run in one) for one in runs]
    every = [one for one_pass in runs for run in one_pass for one in run.generations]
    # By the length of the output too, which is the same in every repeat.
    decoding = sum(
        statistics.median(one.stamps[-1] - one.stamps[0] for run in repeats for one in run.generations)
        for repeats in by_prompt
    )
    decoded = sum(
        statistics.mean(len(one.token_ids) - one.sizes[0] for run in repeats for one in run.generations)
        for repeats in by_prompt
    )
    latencies = sorted(_latencies(every))
    rounds = max(sum(one.stats.rounds for one in every), 1)
    proposed = sum(one.stats.proposed for one in every)
    per_round = sum(one.stats.output_tokens for one in every) / rounds
    return Figures(
        tokens_per_second=sum(run.tokens for run in runs[0]) / seconds,
        slowest=min(passes),
        fastest=max(passes),
        decode_ms_per_token=1e3 * decoding / decoded if decoded else 0.0,
        first_token_ms=1e3 * statistics.median(one.stamps[0] for one in every),
        p50_ms_per_token=1e3 * percentile(latencies, 50),
        p99_ms_per_token=1e3 * percentile(latencies, 99),
        tokens_per_round=per_round,
        acceptance=sum(one.stats.accepted for one in every) / proposed if proposed else None,
        acceptance_per_token=acceptance_per_token(per_round, case.draft_length) if case.draft_length else None,
        draft_length=proposed / rounds,
        ms_per_round=_parts([one.stats for one in every], rounds),
        proposer_changes=sum(bool(one.stats.proposer_changes) for one in every),
    )


def differences(cases: Sequence[Case], runs: Mapping[str, Sequence[Sequence[Run]]]) -> list[str]:
    """Where generations of the same prompt and parameters gave other tokens, one line each: there must be none."""
    first: dict[tuple[tuple[int, ...], SamplingParams], tuple[str, tuple[int, ...]]] = {}
    found: dict[str, None] = {}
    for case in cases:
        for generation in (one for one_pass in runs[case.name] for run in one_pass for one in run.generations):
            said = first.setdefault((generation.prompt, case.params), (case.name, generation.token_ids))
            if said[1] != generation.token_ids:
                found[f"{case.name}: not the tokens of {said[0]}"] = None
    return list(found)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed; 0 of nothing."""
    if not ordered:
        return 0.0
    return ordered[max(-(-int(len(ordered) * percent) // 100) - 1, 0)]


async def _run(case: Case, number: int) -> Run:
    began = time.perf_counter()
    prompts = [case.prompts[(number + session) % len(case.prompts)] for session in range(case.sessions)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_generate(case, prompt)) for prompt in prompts]
    return Run(time.perf_counter() - began, tuple(task.result() for task in tasks))


async def _generate(case: Case, prompt: tuple[int, ...]) -> Generation:
    began = time.perf_counter()
    stamps, sizes = [], []
    async with case.client.stream(prompt, case.params) as stream:
        async for chunk in stream:
            stamps.append(time.perf_counter() - began)
            sizes.append(len(chunk.tokens))
    result = stream.result
    return Generation(prompt, result.token_ids, tuple(stamps), tuple(sizes), result.stats)


def _latencies(generations: Sequence[Generation]) -> list[float]:
    """Seconds of every token behind the first chunk."""
    found = []
    for one in generations:
        for at in range(1, len(one.stamps)):
            size = max(one.sizes[at], 1)
            found += [(one.stamps[at] - one.stamps[at - 1]) / size] * size
    return found


def _parts(every: Sequence[Stats], rounds: int) -> dict[str, float]:
    """Milliseconds per round; of the target alone, which decodes in a loop of its own, the client sees no rounds."""
    parts = {
        "proposing": sum(stats.proposing_seconds for stats in every),
        "drafting": sum(stats.drafting_seconds for stats in every),
        "verifying": sum(stats.verifying_seconds for stats in every),
        "queued": sum(stats.queued_seconds for stats in every),
        "wire": sum(stats.wire_seconds for stats in every),
    }
    return {name: 1e3 * seconds / rounds for name, seconds in parts.items()} if parts["verifying"] else {}
