"""Goals 4, 6, 9 and 12: what the services themselves cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AsyncExitStack

from goals import Measured
from part import Part, compared, plain, script
from settings import Settings, SkippedError, models, running, supports, targets
from specpair import SamplingParams
from specpair.bench.costs import Steps, step_times
from specpair.bench.measuring import Case
from specpair.bench.sweeps import open_client, supported
from specpair.grpc_transports import GrpcTarget

__all__ = ["cache_size", "compiled_start", "lean", "wire"]

# A round that this project is made for, in milliseconds: wire and client may take one twentieth of it.
_ROUND = 20.0


async def lean(settings: Settings, progress: Callable[[str], None]) -> Part:
    """Goal 4: the target as it is, with weights frozen into compiled steps, and with the model's own layers."""
    if not supports("target", "--no-lean"):
        raise SkippedError("the target has no flag --no-lean")
    place = models("pair-70", progress)
    params = SamplingParams(max_new_tokens=settings.max_new_tokens, ignore_eos=True)
    prompts = settings.random_prompts(place, 64)
    # One slot and one attended length: one graph to compile.
    options = {"lean": "", "compiled": "--compile on --compile-freezing", "stock": "--no-lean --compile off"}
    services = [settings.services(place, f"{more} --slots 1 --max-length 256") for more in options.values()]
    async with targets(*services, progress=progress) as addresses, AsyncExitStack() as stack:
        clients = [await open_client(stack, address, "none") for address in addresses]
        # Their tokens may differ from each other, since their sums are other sums.
        cases = [Case(name, client, prompts, params) for name, client in zip(options, clients, strict=True)]
        found, wrong = await compared(cases, settings, progress)
    ms = {name: one.decode_ms_per_token for name, one in found.items()}
    told = f"{ms['stock']:.2f} / {ms['compiled']:.2f} ms per token, compiled; {ms['stock'] / ms['lean']:.2f} without"
    return Part({"cases": plain(found), "same_tokens": not wrong}, [Measured(4, ms["stock"] / ms["compiled"], told)])


async def wire(settings: Settings, progress: Callable[[str], None]) -> Part:
    """Goal 6: what a round takes besides the target's queue and forward pass, on loopback."""
    place = models("pair-70", progress)
    params = SamplingParams(max_new_tokens=settings.max_new_tokens, ignore_eos=True)
    prompts = settings.random_prompts(place, 64)
    async with running(settings.services(place), progress) as (address, draft), AsyncExitStack() as stack:
        target = GrpcTarget(address)
        steps = []
        for repeat in range(settings.repeats + 1):
            for prompt in prompts:
                progress(f"steps, run {repeat + 1}")
                steps.append(await step_times(target, prompt, params))
        await target.close()
        one_by_one = {"chain": 0} if supported("chain") else {}
        client = await open_client(stack, address, draft, one_by_one)
        found, _ = await compared([Case("pair", client, prompts, params)], settings, progress)
    steps = steps[len(prompts) :]
    between = 1e3 * statistics.median(value for one in steps for value in one.between)
    rounds = 1e3 * statistics.median(value for one in steps for value in one.rounds)
    told = found["pair"].ms_per_round.get("wire", 0.0)
    detail = (
        f"{between / _ROUND:.1%} of a round of {_ROUND:g} ms, {between / rounds:.1%} of these of {rounds:.1f} ms; "
        f"the pair's mean by its statistics {told:.2f} ms"
    )
    figures = {"between_ms": between, "round_ms": rounds, "pair": plain(found)}
    return Part(figures, [Measured(6, between, detail)])


async def cache_size(settings: Settings, progress: Callable[[str], None]) -> Part:
    """Goal 9: the same steps with room for 512 tokens and for 4096."""
    place = models("pair-70", progress)
    params = SamplingParams(max_new_tokens=48, ignore_eos=True)
    prompts = settings.random_prompts(place, 200)
    small, large = (settings.services(place, f"--max-length {length}") for length in (512, 4096))
    steps: dict[int, list[Steps]] = {512: [], 4096: []}
    async with targets(small, large, progress=progress) as addresses:
        services = dict(zip(steps, map(GrpcTarget, addresses), strict=True))
        for repeat in range(settings.repeats + 1):
            for prompt in prompts:
                order = list(services.items())
                for length, target in order if repeat % 2 else reversed(order):
                    progress(f"{length} positions, run {repeat + 1}")
                    steps[length].append(await step_times(target, prompt, params))
        for target in services.values():
            await target.close()
    forward = {
        length: 1e3 * statistics.median(value for one in found[len(prompts) :] for value in one.forward)
        for length, found in steps.items()
    }
    same = [one.token_ids for one in steps[512]] == [one.token_ids for one in steps[4096]]
    goal = Measured(9, forward[4096] / forward[512], f"{forward[4096]:.2f} / {forward[512]:.2f} ms per step")
    return Part({"forward_ms": {str(length): value for length, value in forward.items()}, "same_tokens": same}, [goal])


async def compiled_start(settings: Settings, progress: Callable[[str], None]) -> Part:
    """Goal 12: a model that is compiled, twice with the same directory of artifacts, which is empty at first."""
    if not supports("target", "--compile-cache"):
        raise SkippedError("the target has no flag --compile-cache")
    path = settings.results / "compile_start.json"
    place = models("pair-70", progress)
    progress("compiling: minutes")
    options = [str(place / "target"), "--dtype", settings.dtype, "--repeats", str(min(settings.repeats, 3))]
    options += ["--output", str(path)]
    report = await script("compile_start.py", options, path)
    first, second = (report["medians"][which]["total"] for which in ("first", "second"))
    goal = Measured(12, report["second_over_first"]["total"], f"{second:.1f} / {first:.1f} s")
    return Part({"compile_start": path.name}, [goal])
