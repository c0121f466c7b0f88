"""What the parts of a complete benchmark share: how they measure, their models, their services."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import transformers

from specpair.bench.prompts import random_prompts
from specpair.services import Service, started
from specpair_loops import ServiceSettings, wait

__all__ = ["PAIRS", "Pair", "Settings", "SkippedError", "models", "running", "supports", "targets"]

_TOOL = Path("tools/make_benchmark_pair.py")
_PLACE = Path("runs/bench")


class SkippedError(Exception):
    """A part cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Pair:
    """How a benchmark pair is made. The factors are those that the tool's --acceptance finds."""

    factor: float
    hidden_size: int = 512
    layers: int = 8

    @property
    def flags(self) -> list[str]:
        """For the tool."""
        shape = ("--hidden-size", str(self.hidden_size), "--layers", str(self.layers))
        return [*shape, "--factor", str(self.factor)]


PAIRS = {
    "pair-70": Pair(0.0372),
    "pair-80": Pair(0.0205),
    "pair-random": Pair(1.0),
    "large-70": Pair(0.0284, hidden_size=1024, layers=16),
}
"""30 million parameters with an acceptance per token of about 0.7, 0.8 and 0; 214 million with about 0.7."""


@dataclass(frozen=True)
class Settings:
    """How everything is measured."""

    dtype: str = "bf16"
    cores: int = 2
    target_threads: int = 1
    draft_threads: int = 1
    target_options: str = ""
    draft_options: str = ""
    repeats: int = 5
    prompts: int = 3
    max_new_tokens: int = 64
    results: Path = Path("bench/results")
    peers: tuple[str, ...] = ()
    """Flags of the yardstick that say where other programs are."""

    def services(self, place: Path, target_options: str = "", draft_options: str = "") -> ServiceSettings:
        """How the services of a pair are started; a part's own options stand behind the caller's."""
        return ServiceSettings(
            models=place,
            dtype=self.dtype,
            device="cpu",
            target_threads=self.target_threads,
            draft_threads=self.draft_threads,
            target_options=f"{self.target_options} {target_options}",
            draft_options=f"{self.draft_options} {draft_options}",
        )

    def random_prompts(self, place: Path, length: int) -> list[tuple[int, ...]]:
        """Prompts in which nothing repeats."""
        vocabulary = len(transformers.AutoTokenizer.from_pretrained(place / "target"))
        return random_prompts(vocabulary, self.prompts, length)


def models(name: str, progress: Callable[[str], None]) -> Path:
    """The directory of one of PAIRS, made when it is not there as it should be, or of the demo pair.

    Raises SkippedError if it cannot be made.
    """
    if name == "demo":
        return Path("models/demo")
    place, pair = _PLACE / name, PAIRS[name]
    with contextlib.suppress(OSError, ValueError):
        if json.loads((place / "pair.json").read_text(encoding="utf-8"))["factor"] == pair.factor:
            return place
    progress(f"making {place}")
    command = [sys.executable, str(_TOOL), str(place), *pair.flags]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SkippedError(f"{place} cannot be made: {done.stderr.strip().splitlines()[-1:]}")
    return place


@contextlib.asynccontextmanager
async def running(settings: ServiceSettings, progress: Callable[[str], None]) -> AsyncIterator[tuple[str, str]]:
    """Both services until the block ends: addresses of target and draft."""
    with started(settings.flags("target"), settings.flags("draft")) as services:
        await wait(services, progress)
        yield services[0].address, services[1].address


@contextlib.asynccontextmanager
async def targets(*settings: ServiceSettings, progress: Callable[[str], None]) -> AsyncIterator[list[str]]:
    """Target services until the block ends: their addresses."""
    idle = ["--proposer", "ngram"]  # a draft belongs to each; nobody asks it
    with contextlib.ExitStack() as stack:
        found: list[Service] = [stack.enter_context(started(one.flags("target"), idle))[0] for one in settings]
        await wait(found, progress)
        yield [service.address for service in found]


def supports(service: str, flag: str) -> bool:
    """Whether the "target" or the "draft" has a flag."""
    command = [sys.executable, "-m", f"specpair_{service}", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return any(word.strip("[],|") == flag for word in told.split())
