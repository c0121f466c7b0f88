"""Goals 1 to 3: the pair beside other programs, by the yardstick in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from goals import Measured
from measuring import GENERATE, SPECPAIR
from part import Measure, Part, equality, script
from settings import Settings, models

__all__ = ["decided", "yardstick"]

_PAIR = f"{SPECPAIR}pair"
_PROMPT_LENGTH = 128
_PEERS = ("llama-draft", "openvino-draft")
_LOOPS = ("generate", "generate-assisted", "generate-lookup", "llama-alone", "llama-draft", "openvino-alone")
_ALL = (*_LOOPS, "openvino-draft", f"{SPECPAIR}alone", f"{SPECPAIR}ngram", _PAIR, f"{SPECPAIR}combined")


def yardstick(name: str, *, decides: bool, max_new_tokens: int, prompts: int, repeats: int | None = None) -> Measure:
    """The yardstick on a pair of this name; `decides` says whether the goals are about this pair."""
    return partial(_measure, name, decides, max_new_tokens, prompts, repeats)


async def _measure(
    name: str,
    decides: bool,
    max_new_tokens: int,
    prompts: int,
    repeats: int | None,
    settings: Settings,
    progress: Callable[[str], None],
) -> Part:
    place = models(name, progress)
    path = settings.results / f"yardstick_{name}_{settings.dtype}.json"
    options = [
        *("--models", str(place), "--dtype", settings.dtype, "--cores", str(settings.cores), "--json", str(path)),
        *("--prompts", str(prompts), "--max-new-tokens", str(max_new_tokens), "--loops", *_ALL),
        *("--repeats", str(repeats or settings.repeats)),
        *("--target-threads", str(settings.target_threads), "--draft-threads", str(settings.draft_threads)),
        # As one word: what begins with a dash is taken for another flag otherwise.
        *(f"--target-options={settings.target_options}", f"--draft-options={settings.draft_options}"),
        *settings.peers,
    ]
    if name != "demo":  # random weights continue random ids as well, and of these no prompt is easier than another
        options += ["--prompt-length", str(_PROMPT_LENGTH)]
    progress("the yardstick, with a table of its own")
    report = await script("yardstick.py", options, path)
    goals = [equality(report["differences"], f"yardstick, {name}")]
    if decides:
        goals += decided(report["loops"])
    figures = {"yardstick": path.name, "skipped": report["skipped"], "differences": report["differences"]}
    return Part(figures, goals)


def decided(loops: Mapping[str, Mapping[str, Any]]) -> list[Measured]:
    """Goals 1 to 3 as far as the loops were measured."""
    speeds = {name: float(loop["tokens_per_second"]) for name, loop in loops.items()}
    if _PAIR not in speeds:
        return []
    pair, found = speeds[_PAIR], []
    if "generate-assisted" in speeds:
        rate = loops["generate-assisted"].get("acceptance_per_token")
        told = f", its acceptance per token {rate:.2f}" if rate is not None else ""
        detail = f"{pair:.0f} / {speeds['generate-assisted']:.0f} tokens/s{told}"
        found.append(Measured(1, pair / speeds["generate-assisted"], detail))
    if GENERATE in speeds:
        found.append(Measured(2, pair / speeds[GENERATE], f"{pair:.0f} / {speeds[GENERATE]:.0f} tokens/s"))
    if peers := {name: speeds[name] for name in _PEERS if name in speeds}:
        fastest = max(peers, key=lambda name: peers[name])
        told = ", ".join(f"{name} {speed:.0f}" for name, speed in peers.items())
        found.append(Measured(3, pair / peers[fastest], f"{pair:.0f} tokens/s; {told}"))
    return found
