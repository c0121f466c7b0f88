"""What every loop is asked and answers, the order in which loops are measured, and the arithmetic on what they took."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from specpair.bench.theory import acceptance_per_token

__all__ = [
    "ALONE",
    "GENERATE",
    "SPECPAIR",
    "Generation",
    "Loop",
    "Runs",
    "Summary",
    "agreement",
    "differences",
    "measure",
    "summarize",
]

GENERATE = "generate"
"""The loop that the others are compared with: transformers without any option."""
SPECPAIR = "specpair-"
"""What the names of this project's loops begin with."""
ALONE = f"{SPECPAIR}alone"


@dataclass(frozen=True, slots=True)
class Generation:
    """One continuation of one prompt."""

    token_ids: tuple[int, ...]
    seconds: float
    """Of the whole call, the prompt included, as the caller waits for it."""
    rounds: int
    """Forward passes of the target that gave tokens."""
    proposed: int = 0
    accepted: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds by where they went, as far as the loop tells."""


class Loop(Protocol):
    """A way to continue a prompt greedily by a fixed number of tokens."""

    @property
    def name(self) -> str:
        """As in the table."""
        ...

    @property
    def draft_length(self) -> int | None:
        """Proposals in every round; None if there are none or their number varies."""
        ...

    def run(self, prompt: Sequence[int]) -> Generation:
        """Continues a prompt and times it."""
        ...


Runs = Sequence[Sequence[Generation]]
"""Of one loop: by repeat, then by prompt."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One loop's figures over all prompts and repeats."""

    loop: str
    tokens_per_second: float
    """All tokens of one pass over the prompts, over the sum of each prompt's median seconds."""
    slowest: float
    """Tokens per second of the slowest pass."""
    fastest: float
    acceptance: float | None
    """Accepted per proposed token; None without proposals."""
    acceptance_per_token: float | None
    """Chance that a proposal is accepted when those before it were; None unless the draft length is constant."""
    tokens_per_round: float
    milliseconds_per_round: Mapping[str, float]
    """Of the whole call by round, and of its parts as far as the loop tells."""


def measure(
    loops: Sequence[Loop], prompts: Sequence[Sequence[int]], repeats: int, progress: Callable[[str], None]
) -> dict[str, list[list[Generation]]]:
    """Every loop on every prompt, `repeats` times, in turns.

    The loops take turns prompt by prompt, so that what else happens on the machine happens to all of them; each turn
    starts with the next loop, so that none always follows the same one.
    """
    runs: dict[str, list[list[Generation]]] = {loop.name: [] for loop in loops}
    turn = 0
    for repeat in range(repeats):
        for passes in runs.values():
            passes.append([])
        for number, prompt in enumerate(prompts):
            start = turn % len(loops)
            for loop in (*loops[start:], *loops[:start]):
                progress(f"run {repeat + 1} of {repeats}, prompt {number + 1} of {len(prompts)}: {loop.name}")
                runs[loop.name][-1].append(loop.run(prompt))
            turn += 1
    return runs


def summarize(loop: Loop, runs: Runs) -> Summary:
    """The figures of one loop.

    The median is taken prompt by prompt, where the same work was done every time; a pass over all prompts would let one
    disturbed run spoil the others of its pass.
    """
    every = [run for one_pass in runs for run in one_pass]
    tokens = sum(len(run.token_ids) for run in runs[0])
    seconds = sum(statistics.median(run.seconds for run in repeats) for repeats in zip(*runs, strict=True))
    passes = [sum(len(run.token_ids) for run in one) / sum(run.seconds for run in one) for one in runs]
    rounds = sum(run.rounds for run in every)
    proposed = sum(run.proposed for run in every)
    per_round = sum(len(run.token_ids) for run in every) / rounds
    names = dict.fromkeys(name for run in every for name in run.parts)
    parts = {name: 1e3 * sum(run.parts.get(name, 0.0) for run in every) / rounds for name in names}
    return Summary(
        loop=loop.name,
        tokens_per_second=tokens / seconds,
        slowest=min(passes),
        fastest=max(passes),
        acceptance=sum(run.accepted for run in every) / proposed if proposed else None,
        acceptance_per_token=acceptance_per_token(per_round, loop.draft_length) if loop.draft_length else None,
        tokens_per_round=per_round,
        milliseconds_per_round={"whole": 1e3 * seconds * len(runs) / rounds, **parts},
    )


def agreement(one: Sequence[Generation], other: Sequence[Generation]) -> dict[str, float]:
    """Over the prompts: the share with equal tokens, and the mean share of tokens before the first difference."""
    shares = [_common(a.token_ids, b.token_ids) / max(len(a.token_ids), 1) for a, b in zip(one, other, strict=True)]
    equal = [a.token_ids == b.token_ids for a, b in zip(one, other, strict=True)]
    return {"prompts_equal": statistics.fmean(equal), "tokens_before_a_difference": statistics.fmean(shares)}


def differences(runs: Mapping[str, Runs], *, exact: bool) -> list[str]:
    """Where tokens differ that must not, one line each.

    This project's loops must always say the same, whoever proposes, every time. With `exact`, for fp32, they and all of
    transformers' must say what `generate` says. In bf16 the two best tokens are often so close that the shape of the
    computation decides, and transformers' own loops differ from each other. Other programs compute in other shapes.
    """
    found = []
    runs = {name: passes for name, passes in runs.items() if name.startswith((GENERATE, SPECPAIR))}
    for name, passes in runs.items():
        if (exact or name.startswith(SPECPAIR)) and any(_tokens(a) != _tokens(b) for a, b in pairwise(passes)):
            found.append(f"{name}: not the same tokens every time")
    ours = [name for name in runs if name.startswith(SPECPAIR)]
    pairs = list(pairwise(ours))
    if exact and GENERATE in runs:
        pairs += [(GENERATE, name) for name in runs if name != GENERATE]
    found += [
        f"{name}: not the tokens of {first}"
        for first, name in pairs
        if _tokens(runs[first][0]) != _tokens(runs[name][0])
    ]
    return found


def _tokens(one_pass: Sequence[Generation]) -> list[tuple[int, ...]]:
    return [run.token_ids for run in one_pass]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
