"""What every part of a complete benchmark answers with."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from goals import Measured
from settings import Settings
from specpair.bench.measuring import Case, Figures, differences, figures, measure
from specpair.bench.running import rounded

__all__ = ["Measure", "Part", "compared", "equality", "plain", "script"]


@dataclass(frozen=True)
class Part:
    """Figures, as JSON has them, and the goals that they decide."""

    figures: Mapping[str, object]
    goals: Sequence[Measured] = ()


Measure = Callable[[Settings, Callable[[str], None]], Awaitable[Part]]
"""Measures a part. Raises SkippedError where it cannot, and what the services raise."""


async def compared(
    cases: Sequence[Case], settings: Settings, progress: Callable[[str], None]
) -> tuple[dict[str, Figures], list[str]]:
    """Cases in turns: their figures, and where tokens differ that must not."""
    runs = await measure(cases, settings.repeats, progress)
    return {case.name: figures(case, runs[case.name]) for case in cases}, differences(cases, runs)


def equality(wrong: Sequence[str], what: str) -> Measured:
    """Goal 11, as far as a part can say."""
    return Measured(11, 0.0 if wrong else 1.0, "; ".join(wrong) or what)


def plain(found: Mapping[str, Figures]) -> dict[str, object]:
    """Figures as JSON has them."""
    return {name: rounded(asdict(one)) for name, one in found.items()}


async def script(name: str, arguments: Sequence[str], path: Path) -> dict[str, Any]:
    """Runs a script of this directory, which prints what it has to say and writes `path`: what stands there then.

    Raises RuntimeError if it writes nothing. An exit code alone is no failure: scripts end with 1 where tokens differ.
    """
    before = _written(path)
    command = [sys.executable, str(Path(__file__).parent / name), *arguments]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    try:
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:  # interrupted: it stops its own children
            process.terminate()
            await process.wait()
    if (after := _written(path)) == before or after is None:
        raise RuntimeError(f"{name} ended with code {process.returncode}: {errors.decode()[-400:]}")
    return _read(path)


def _written(path: Path) -> int | None:
    """When; None if there is nothing."""
    return path.stat().st_mtime_ns if path.exists() else None


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
