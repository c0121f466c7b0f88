"""What a model takes of a device's memory, as `specpair_runtime.plan` computes it in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from specpair.errors import InternalError, ModelLoadError

__all__ = ["Format", "MemoryPlan", "plan"]


@dataclass(frozen=True, slots=True)
class Format:
    """Bytes that a model takes in one format: weights, and one KV slot."""

    name: str
    weights: int
    slot: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a model takes. `fits` says for each memory size in bytes how many slots fit beside the weights."""

    model: str
    architecture: str
    parameters: int
    max_length: int
    formats: tuple[Format, ...]
    fits: dict[int, dict[str, int]]
    parallel: int = 1
    """Processes that share the model; all figures are for one of them."""


def plan(
    model: str, *, max_length: int | None = None, memory: Sequence[str] = (), parallel: int | None = None
) -> MemoryPlan:
    """The plan for a directory or hub id and memory sizes such as "24GB".

    Raises ModelLoadError with the runtime's own words for what it refuses, and if it is not installed.
    """
    flags = [f"--gpu={size}" for size in memory]
    if max_length is not None:
        flags.append(f"--max-length={max_length}")
    if parallel is not None:
        flags.append(f"--parallel={parallel}")
    done = subprocess.run(
        [sys.executable, "-m", "specpair_runtime.plan", *flags, "--", model],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise _failure(done.returncode, done.stderr)
    found = json.loads(done.stdout)
    found["formats"] = tuple(Format(**one) for one in found["formats"])
    found["fits"] = {int(size): slots for size, slots in found["fits"].items()}
    return MemoryPlan(**found)


def _failure(code: int, said: str) -> ModelLoadError | InternalError:
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "no output")
    if last.startswith("ModuleNotFoundError: "):
        return ModelLoadError("planning needs the extra target: pip install 'specpair[target]'")
    if code == 2:
        return ModelLoadError(last.removeprefix("error: "))
    return InternalError(f"the plan ended with code {code}: {last}")
