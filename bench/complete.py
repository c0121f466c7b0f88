"""The complete benchmark, part by part: `make bench`, or `python bench/complete.py --only sessions delay`.

Starts what it measures itself. Each part writes bench/results/part_NAME.json as soon as it is done; the table of goals
is made of the parts' files, those of earlier runs included, so that a run can be broken off and gone on with by
`--resume`. Ends with code 1 if a part failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from client_parts import equal_tokens, never_slower, sweep
from goals import GOALS, gather, goals_object, markdown, table
from part import Measure
from report import OtherWork, machine, pin, relative, versions, write_report
from service_parts import cache_size, compiled_start, lean, wire
from settings import Settings, SkippedError
from yardstick_part import yardstick

__all__ = ["PARTS", "Options", "parse"]

_LONG = "--max-length 4224"
PARTS: Mapping[str, tuple[Measure, tuple[int, ...]]] = {
    "yardstick-70": (yardstick("pair-70", decides=True, max_new_tokens=96, prompts=2), (1, 2, 3)),
    "lean": (lean, (4,)),
    "draft-length": (sweep("draft-length", pair="pair-80"), (5,)),
    "wire": (wire, (6,)),
    "delay": (sweep("delay", pair="pair-80", max_new_tokens=192), (7,)),
    "sessions": (sweep("sessions", pair="pair-80"), (8,)),
    "cache-size": (cache_size, (9,)),
    "context": (sweep("context", pair="pair-80", target=_LONG, draft=_LONG), ()),
    "never-slower": (never_slower, (10,)),
    "equal-tokens": (equal_tokens, (11,)),
    "compiled-start": (compiled_start, (12,)),
    "yardstick-demo": (yardstick("demo", decides=False, max_new_tokens=96, prompts=5), ()),
    "sweeps": (sweep("proposer", "temperature", pair="demo"), ()),
    "large": (yardstick("large-70", decides=False, max_new_tokens=32, prompts=1, repeats=3), ()),
}
"""By name: what measures a part, and the goals that it decides."""
_EXTRA = ("large",)
"""Runs only when it is asked for: minutes of its own."""


@dataclass(frozen=True)
class Options:
    """Which parts run, and how."""

    parts: tuple[str, ...]
    resume: bool
    settings: Settings


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from a command line; None takes the process's own."""
    usual = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=(*PARTS, "goals"), metavar="PART", help=f"goals, or of: {', '.join(PARTS)}")
    add("--resume", action="store_true", help="leave out parts that have been measured with the same options")
    add("--quick", action="store_true", help="few runs of everything: to see that it works, not to believe it")
    add("--dtype", choices=("bf16", "fp32"), default=usual.dtype)
    add("--cores", type=int, default=usual.cores, metavar="N", help="everything runs on the same N cores")
    add("--target-threads", type=int, default=usual.target_threads, metavar="N")
    add("--draft-threads", type=int, default=usual.draft_threads, metavar="N")
    add("--target-options", default="", metavar="FLAGS", help="more flags for every target service")
    add("--draft-options", default="", metavar="FLAGS", help="more flags for every draft service")
    add("--repeats", type=int, default=usual.repeats, metavar="N", help="timed runs of every case")
    add("--results", type=Path, default=usual.results, metavar="DIR")
    for flag in ("--llama-dir", "--llama-source", "--llama-python", "--openvino-python"):
        add(flag, metavar="PATH", help="as the yardstick's")
    given = vars(parser.parse_args(arguments))
    peers = []
    for name in ("llama_dir", "llama_source", "llama_python", "openvino_python"):
        if (value := given.pop(name)) is not None:
            peers += [f"--{name.replace('_', '-')}", value]
    only, resume, quick = given.pop("only"), given.pop("resume"), given.pop("quick")
    settings = replace(usual, **given, peers=tuple(peers))
    if quick:
        settings = replace(settings, repeats=1, prompts=1, max_new_tokens=24)
    chosen = tuple(name for name in PARTS if name not in _EXTRA)
    if only is not None:
        chosen = () if "goals" in only else tuple(name for name in PARTS if name in only)
        if "goals" in only:
            chosen = tuple(name for name, (_, numbers) in PARTS.items() if numbers or name in only)
    return Options(chosen, resume, settings)


def main() -> None:
    """Runs the parts and shows the goals."""
    options = parse()
    signal.signal(signal.SIGTERM, _terminated)
    cores = pin(options.settings.cores)
    stdout, stderr = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    reasons, failed = {}, False
    for number, name in enumerate(options.parts, 1):
        path = options.settings.results / f"part_{name}.json"
        if options.resume and _is_done(path, options.settings):
            stdout.print(f"{name}: measured before", highlight=False)
            continue
        try:
            with stderr.status(name) as status:
                label = f"part {number} of {len(options.parts)}, {name}"
                took = _run(name, path, options.settings, cores, lambda line, at=label: status.update(f"{at}: {line}"))
            stdout.print(f"{name}: {took:.0f} s", highlight=False)
        except SkippedError as reason:
            stdout.print(f"{name}: skipped: {reason}", highlight=False)
            reasons |= dict.fromkeys(PARTS[name][1], str(reason))
        except Exception as error:  # one part that fails does not cost the others
            traceback.print_exc()
            failed = True
            reasons |= dict.fromkeys(PARTS[name][1], f"failed: {error}")
    stdout.print(_goals(options.settings, cores, reasons))
    sys.exit(1 if failed else 0)


def _run(name: str, path: Path, settings: Settings, cores: Sequence[int], progress) -> float:  # noqa: ANN001
    """Measures a part and writes its file; returns the seconds that it took."""
    facts = {"machine": machine(cores), "settings": _plain(settings)}
    other, began = OtherWork(), time.perf_counter()
    part = asyncio.run(PARTS[name][0](settings, progress))
    seconds = time.perf_counter() - began
    goals = [{"number": one.number, "value": one.value, "met": one.met, "detail": one.detail} for one in part.goals]
    measured = {"seconds": round(seconds, 1), "cores_busy_with_other_work": other.cores(), "goals": goals}
    write_report(path, {**measured, **part.figures}, facts)
    return seconds


def _goals(settings: Settings, cores: Sequence[int], reasons: Mapping[int, str]):  # noqa: ANN202
    """Writes the table of goals as JSON and as a page, and returns it to be printed."""
    found = gather(settings.results)
    rows = goals_object(found, {number: reasons[number] for number in GOALS if number in reasons})
    facts = {"machine": machine(cores), "settings": _plain(settings)}
    write_report(settings.results / "goals.json", {"goals": rows}, facts)
    told = {
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": ", ".join(f"{name} {value}" for name, value in machine(cores).items()),
        "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
    }
    (settings.results / "goals.md").write_text(markdown(rows, told), encoding="utf-8")
    return table(rows)


def _is_done(path: Path, settings: Settings) -> bool:
    """Whether a part has been measured with these settings."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["settings"] == _plain(settings))
    except (OSError, ValueError, KeyError):
        return False


def _plain(settings: Settings) -> dict[str, object]:
    """Settings as JSON has them, without places of a machine."""
    told = {**asdict(settings), "results": relative(str(settings.results))}
    told["peers"] = [flag for flag in settings.peers if flag.startswith("--")]
    return told


def _terminated(signum: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack like Ctrl-C does, so that the services are stopped."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
