"""Goals 5, 7, 8, 10 and 11: what a client of both services sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial

from goals import Measured
from part import Measure, Part, compared, equality, plain
from settings import Settings, models, running
from specpair import SamplingParams
from specpair.bench import running as sweeping
from specpair.bench.comparison import best
from specpair.bench.costs import resumed
from specpair.bench.measuring import Case, differences, measure
from specpair.bench.prompts import cut, read_texts, tokenized
from specpair.bench.running import Options, Outcome
from specpair.bench.sweeps import open_client, supported
from specpair.grpc_transports import GrpcTarget

__all__ = ["equal_tokens", "never_slower", "sweep"]

_SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=7)


def sweep(*names: str, pair: str, target: str = "", draft: str = "", max_new_tokens: int | None = None) -> Measure:
    """Sweeps of `specpair bench` on a pair of this name, with their plots; `target` and `draft` are more flags.

    `max_new_tokens` is in place of the settings'.
    """
    return partial(_sweep, names, pair, (target, draft), max_new_tokens)


async def _sweep(
    names: Sequence[str],
    pair: str,
    flags: tuple[str, str],
    max_new_tokens: int | None,
    settings: Settings,
    progress: Callable[[str], None],
) -> Part:
    place = models(pair, progress)
    services = settings.services(place, f"--slots 16 {flags[0]}", f"--slots 16 {flags[1]}")
    async with running(services, progress) as (target, draft):
        options = Options(
            target=target,
            draft=draft,
            sweeps=tuple(names),
            prompts=place / "prompts.json",
            prompt_count=settings.prompts,
            max_new_tokens=max_new_tokens or settings.max_new_tokens,
            repeats=settings.repeats,
            contexts=(128, 256, 512, 1024, 2048, 4096),
            output=settings.results,
        )
        outcome = await sweeping.run_sweeps(options, progress)
    progress(sweeping.plot(outcome, settings.results))
    report = sweeping.report(options, outcome)
    told = {name: report[name] for name in ("target", "draft", "draft_token_ms", "sweeps", "theory", "differences")}
    return Part({"pair": pair, **told}, [*_decided(outcome), equality(outcome.differences, f"sweeps of {pair}")])


def _decided(outcome: Outcome) -> list[Measured]:
    """Goals 5, 7 and 8 as far as their sweeps were measured."""
    found = []
    if (one := best(outcome.comparisons)) is not None and one.ratio is not None:
        auto = next((other.measured for other in outcome.comparisons if other.draft_length == "auto"), None)
        told = f"k = {one.draft_length}: {one.measured:.2f} of {one.pipelined:.2f}, serial {one.serial:.2f}"
        costs = f"a = {one.acceptance_per_token:.2f}, c = {one.draft_cost:.3f}, v = {one.verify_cost:.2f}"
        found.append(Measured(5, one.ratio, f"{told}; {costs}" + (f"; auto {auto:.2f}" if auto else "")))
    speeds = {
        (one.name, point.series, point.value): point.figures.tokens_per_second
        for one in outcome.sweeps
        for point in one.points
    }
    near, far = speeds.get(("delay", "chained", 0.0)), speeds.get(("delay", "chained", 50.0))
    if near and far:
        without = speeds[("delay", "one by one", 50.0)] / speeds[("delay", "one by one", 0.0)]
        found.append(Measured(7, far / near, f"{far:.0f} / {near:.0f} tokens/s; without chained blocks {without:.2f}"))
    one, eight = speeds.get(("sessions", "pair", 1)), speeds.get(("sessions", "pair", 8))
    if one and eight:
        alone = speeds[("sessions", "alone", 8)] / speeds[("sessions", "alone", 1)]
        found.append(Measured(8, eight / one, f"{eight:.0f} / {one:.0f} tokens/s; target alone {alone:.2f}"))
    return found


async def never_slower(settings: Settings, progress: Callable[[str], None]) -> Part:
    """Goal 10: a draft whose proposals are hardly ever right, and prompt lookup where nothing repeats."""
    place = models("pair-random", progress)
    prompts = settings.random_prompts(place, 96)
    length = 2 * settings.max_new_tokens
    greedy = SamplingParams(max_new_tokens=length, ignore_eos=True)
    # Drawn freely, the output of random weights does not repeat itself either.
    drawn = replace(greedy, temperature=1.0, seed=1)
    async with running(settings.services(place), progress) as (target, draft), AsyncExitStack() as stack:
        alone = await open_client(stack, target, "none")
        pair = await open_client(stack, target, draft)
        lookup = await open_client(stack, target, "ngram")
        # Greedy output of random weights falls into loops, in which lookup beside the model finds something.
        model = await open_client(stack, target, draft, {"lookup": False} if supported("lookup") else {})
        cases = [
            Case("alone, greedy", alone, prompts, greedy),
            Case("pair, greedy", pair, prompts, greedy),
            Case("model, greedy", model, prompts, greedy),
            Case("alone, drawn", alone, prompts, drawn),
            Case("ngram, drawn", lookup, prompts, drawn),
        ]
        found, wrong = await compared(cases, settings, progress)
    ratios, told = [], []
    bases = {"model, greedy": "alone, greedy", "pair, greedy": "alone, greedy", "ngram, drawn": "alone, drawn"}
    for case, base in bases.items():
        ratios.append(found[case].tokens_per_second / found[base].tokens_per_second)
        told.append(f"{case} {ratios[-1]:.3f} ({found[case].acceptance or 0:.1%} accepted)")
    goal = Measured(10, min(ratios), "; ".join(told))
    return Part({"cases": plain(found), "differences": wrong}, [goal, equality(wrong, "random pair")])


async def equal_tokens(settings: Settings, progress: Callable[[str], None]) -> Part:
    """Goal 11: every way to generate the same thing, greedy and drawn, each once; resumed ones too."""
    place = models("demo", progress)
    services = settings.services(place, "--slots 4", "--slots 4")
    async with running(services, progress) as (target, draft), AsyncExitStack() as stack:
        alone = await open_client(stack, target, "none")
        prompts = await tokenized(alone, read_texts(place / "prompts.json", 3))
        prompts.append(cut(prompts, 400)[0])
        ways: dict[str, tuple[str, dict[str, object]]] = {"ngram": ("ngram", {}), "model, auto": (draft, {})}
        ways |= {f"model, k = {length}": (draft, {"draft_length": length}) for length in (1, 3, 5, 7)}
        if supported("lookup"):
            ways["model without lookup"] = (draft, {"lookup": False})
        if supported("chain"):
            ways |= {f"chain {depth}": (draft, {"chain": depth}) for depth in (0, 1, 3)}
        clients = {"none": alone}
        for name, (proposer, options) in ways.items():
            clients[name] = await open_client(stack, target, proposer, options)
        cases = []
        for kind, params in (("greedy", SamplingParams()), ("drawn", _SEEDED)):
            params = replace(params, max_new_tokens=settings.max_new_tokens, ignore_eos=True)
            cases += [Case(f"{name}, {kind}", client, prompts, params) for name, client in clients.items()]
            cases.append(Case(f"four sessions, {kind}", clients["model, auto"], prompts, params, sessions=4))
        runs = await measure(cases, 1, progress)
        wrong = differences(cases, runs)
        generations = sum(len(run.generations) for case in cases for run in runs[case.name][0])
        reference = {case.params: runs[case.name][0] for case in cases if case.name.startswith("none")}
        service = GrpcTarget(target)
        for params, said in reference.items():
            for run in said:
                (one,) = run.generations
                for at in (len(one.token_ids) // 3, len(one.token_ids) - 3):
                    progress(f"resumed behind {at} tokens")
                    generations += 1
                    if await resumed(service, one.prompt, params, one.token_ids[:at]) != one.token_ids:
                        wrong.append(f"resumed behind {at} tokens: not the tokens of none")
        await service.close()
    detail = f"{generations} generations in {len(cases) + 2} ways"
    return Part({"cases": [case.name for case in cases], "differences": wrong}, [equality(wrong, detail)])
