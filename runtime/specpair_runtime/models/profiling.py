"""A trace of an engine's steps, for `--profile`: which operations a step consists of, and what the engine waits for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import structlog
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from specpair_runtime.serving import ServiceConfig

__all__ = ["Profiler", "StepProfiler", "Unprofiled", "profiler_of"]

# Steps that pass first: those after a start are not like the others.
_SKIPPED = 20


class Profiler(Protocol):
    """Is told of an engine's steps, in the engine's thread."""

    def step(self, name: str) -> AbstractContextManager[None]:
        """Around one step, called `name`."""
        ...

    def close(self) -> None:
        """The engine stops."""
        ...


class Unprofiled:
    """Records nothing."""

    def step(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        pass


def profiler_of(config: ServiceConfig, service: str) -> Profiler:
    """What a service's options ask for."""
    return StepProfiler(config.profile, service, config.profile_steps) if config.profile else Unprofiled()


class StepProfiler:
    """Records steps of one thread and writes them in Chrome's trace format, which ui.perfetto.dev shows.

    Every method belongs to the engine thread, because the profiler sees the operations of the thread that started it.
    """

    def __init__(self, directory: str, service: str, steps: int) -> None:
        """Writes `directory`/`service`-PID.json after `steps` steps, or what there is when the engine stops."""
        self._path = Path(directory) / f"{service}-{os.getpid()}.json"
        self._steps = steps
        self._count = itertools.count(-_SKIPPED)
        self._profile: profile | None = None
        self._log = structlog.get_logger("specpair.profile")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Records the block as one step called `name`."""
        number = next(self._count)
        if number == 0:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profile.start()
        with record_function(name):
            yield
        if number + 1 == self._steps:
            self.close()

    def close(self) -> None:
        """Writes what was recorded, if anything was."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self._path))
        self._log.info("trace written", path=str(self._path))
