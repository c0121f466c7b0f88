"""What is varied: each sweep changes one thing and measures it beside the target alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import cast

from specpair.bench.measuring import Case, Figures, differences, figures, measure
from specpair.bench.prompts import cut
from specpair.bench.relay import relay
from specpair.client import ClientOptions, SpeculativeClient
from specpair.params import SamplingParams

__all__ = ["NAMES", "Bench", "Point", "Sweep", "open_client", "run_sweep", "supported"]

NAMES = ("draft-length", "proposer", "sessions", "context", "temperature", "delay")

_ALONE = "alone"


@dataclass(frozen=True)
class Bench:
    """What all sweeps have in common."""

    target: str
    draft: str
    prompts: Sequence[tuple[int, ...]]
    params: SamplingParams
    """Greedy, a fixed number of new tokens."""
    repeats: int
    verify_width: int
    slots: int
    max_length: int
    progress: Callable[[str], None]
    sessions: tuple[int, ...] = (1, 2, 4, 8, 16)
    contexts: tuple[int, ...] = (64, 256, 512, 1024)
    temperatures: tuple[float, ...] = (0.0, 0.5, 0.8, 1.0)
    delays: tuple[float, ...] = (0.0, 5.0, 20.0, 50.0)
    """Milliseconds of a round trip."""
    access: ClientOptions = field(default_factory=ClientOptions)
    """How clients get in."""


@dataclass(frozen=True)
class Point:
    """One case of a sweep."""

    series: str
    """Cases that make one line in a plot."""
    value: float | str
    """Of what is varied; a word where it is no number."""
    figures: Figures
    speedup: float | None
    """Tokens per second over those of the target alone in the same circumstances."""


@dataclass(frozen=True)
class Sweep:
    """One sweep's outcome."""

    name: str
    points: tuple[Point, ...]
    differences: tuple[str, ...] = ()
    """Where tokens differ that must not."""
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Planned:
    """A case, where it stands in its sweep, and the case that its speed-up is over."""

    series: str
    value: float | str
    case: Case
    base: str | None = None


async def run_sweep(name: str, bench: Bench) -> Sweep:
    """Measures one of NAMES. Raises any exception of `specpair.errors`."""
    async with AsyncExitStack() as stack:
        planned, skipped = await _PLANS[name](bench, stack)
        if not planned:
            return Sweep(name, (), (), tuple(skipped))
        runs = await measure([one.case for one in planned], bench.repeats, bench.progress)
        found = {one.case.name: figures(one.case, runs[one.case.name]) for one in planned}
        wrong = differences([one.case for one in planned], runs)
    return Sweep(name, tuple(_point(one, found) for one in planned), tuple(wrong), tuple(skipped))


def supported(option: str) -> bool:
    """Whether this client has an option of this name."""
    return option in ClientOptions.__annotations__


async def open_client(
    stack: AsyncExitStack, target: str, draft: str, options: Mapping[str, object] | None = None
) -> SpeculativeClient:
    """A client that is closed with the stack."""
    made = SpeculativeClient(target, draft, **cast(ClientOptions, dict(options or {})))
    return await stack.enter_async_context(made)


async def _client(
    bench: Bench, stack: AsyncExitStack, target: str, draft: str, options: Mapping[str, object] | None = None
) -> SpeculativeClient:
    """The same, with what services want to know of a client."""
    return await open_client(stack, target, draft, {**bench.access, **(options or {})})


_Plan = tuple[list[_Planned], list[str]]


async def _draft_length(bench: Bench, stack: AsyncExitStack) -> _Plan:
    """Every fixed length, the client's own choice, and nobody. Prompt lookup stays out of it."""
    planned = [await _alone(bench, stack)]
    model = {"lookup": False} if supported("lookup") else {}
    lengths: list[int | None] = [*range(bench.verify_width), None]
    for length in lengths:
        client = await _client(bench, stack, bench.target, bench.draft, {**model, "draft_length": length})
        word = "auto" if length is None else f"k = {length}"
        case = Case(word, client, bench.prompts, bench.params, draft_length=length)
        planned.append(_Planned("model", "auto" if length is None else length, case, _ALONE))
    return planned, []


async def _proposer(bench: Bench, stack: AsyncExitStack) -> _Plan:
    drafts: dict[str, tuple[str, Mapping[str, object]]] = {"ngram": ("ngram", {}), "model": (bench.draft, {})}
    if supported("lookup"):
        drafts["model"] = (bench.draft, {"lookup": False})
        drafts["combined"] = (bench.draft, {})
    planned = [await _alone(bench, stack)]
    for name, (draft, options) in drafts.items():
        client = await _client(bench, stack, bench.target, draft, options)
        planned.append(_Planned("", name, Case(name, client, bench.prompts, bench.params), _ALONE))
    return planned, []


async def _sessions(bench: Bench, stack: AsyncExitStack) -> _Plan:
    planned = []
    pair, alone = await _pair(bench, stack), await _client(bench, stack, bench.target, "none")
    for count in (count for count in bench.sessions if count <= bench.slots):
        for series, client in ((_ALONE, alone), ("pair", pair)):
            case = Case(f"{series}, {count} sessions", client, bench.prompts, bench.params, sessions=count)
            planned.append(_Planned(series, count, case, None if client is alone else f"{_ALONE}, {count} sessions"))
    skipped = [
        f"{count} sessions: the target has {bench.slots} slots" for count in bench.sessions if count > bench.slots
    ]
    return planned, skipped


async def _context(bench: Bench, stack: AsyncExitStack) -> _Plan:
    planned = []
    pair, alone = await _pair(bench, stack), await _client(bench, stack, bench.target, "none")
    longest = bench.max_length - (bench.params.max_new_tokens or 0) - 1
    for length in (length for length in bench.contexts if length <= longest):
        for series, client in ((_ALONE, alone), ("pair", pair)):
            case = Case(f"{series}, prompt of {length}", client, cut(bench.prompts, length), bench.params)
            planned.append(_Planned(series, length, case, None if client is alone else f"{_ALONE}, prompt of {length}"))
    skipped = [
        f"prompt of {length}: the target has room for {longest}" for length in bench.contexts if length > longest
    ]
    return planned, skipped


async def _temperature(bench: Bench, stack: AsyncExitStack) -> _Plan:
    planned = []
    pair, alone = await _pair(bench, stack), await _client(bench, stack, bench.target, "none")
    for temperature in bench.temperatures:
        params = replace(bench.params, temperature=temperature, seed=1)
        for series, client in ((_ALONE, alone), ("pair", pair)):
            case = Case(f"{series}, temperature {temperature:g}", client, bench.prompts, params)
            base = None if client is alone else f"{_ALONE}, temperature {temperature:g}"
            planned.append(_Planned(series, temperature, case, base))
    return planned, []


async def _delay(bench: Bench, stack: AsyncExitStack) -> _Plan:
    """Both services behind relays; blocks one by one and, where the client can, chained."""
    planned = []
    chains: dict[str, Mapping[str, object]] = {"one by one": {}}
    if supported("chain"):
        chains = {"one by one": {"chain": 0}, "chained": {"chain": None}}
    for delay in bench.delays:
        target = await stack.enter_async_context(relay(bench.target, delay / 1e3))
        draft = await stack.enter_async_context(relay(bench.draft, delay / 1e3))
        for series, options in chains.items():
            # A distant draft is not a lost one.
            client = await _client(bench, stack, target, draft, {**options, "draft_timeout": 2 + delay / 100})
            case = Case(f"{series}, {delay:g} ms", client, bench.prompts, bench.params)
            planned.append(_Planned(series, delay, case))
    skipped = [] if supported("chain") else ["chained blocks: this client has none"]
    return planned, skipped


async def _alone(bench: Bench, stack: AsyncExitStack) -> _Planned:
    client = await _client(bench, stack, bench.target, "none")
    return _Planned("", _ALONE, Case(_ALONE, client, bench.prompts, bench.params))


async def _pair(bench: Bench, stack: AsyncExitStack) -> SpeculativeClient:
    """As a caller gets it who chooses nothing."""
    return await _client(bench, stack, bench.target, bench.draft)


def _point(planned: _Planned, found: Mapping[str, Figures]) -> Point:
    own = found[planned.case.name]
    base = found.get(planned.base or "")
    speedup = own.tokens_per_second / base.tokens_per_second if base else None
    return Point(planned.series, planned.value, own, speedup)


_PLANS = {
    "draft-length": _draft_length,
    "proposer": _proposer,
    "sessions": _sessions,
    "context": _context,
    "temperature": _temperature,
    "delay": _delay,
}
