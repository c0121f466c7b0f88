"""This project's loops on a pair of models: both services as processes of their own, and clients of them."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from measuring import ALONE, SPECPAIR, Generation
from specpair import SamplingParams, SpeculativeClient
from specpair.results import Stats
from specpair.services import Service, started

__all__ = ["NAMES", "ServiceSettings", "SpecpairLoop", "serve_loops", "wait"]

_NGRAM, _PAIR, _COMBINED = f"{SPECPAIR}ngram", f"{SPECPAIR}pair", f"{SPECPAIR}combined"
NAMES = (ALONE, _NGRAM, _PAIR, _COMBINED)


@dataclass(frozen=True)
class ServiceSettings:
    """How the services are started."""

    models: Path
    dtype: str
    device: str
    target_threads: int
    draft_threads: int
    target_options: str = ""
    """More flags, as on a command line."""
    draft_options: str = ""

    def flags(self, service: str) -> list[str]:
        """Flags of the "target" or the "draft"."""
        threads, more = {
            "target": (self.target_threads, self.target_options),
            "draft": (self.draft_threads, self.draft_options),
        }[service]
        return [
            *("--model", str(self.models / service), "--dtype", self.dtype, "--device", self.device),
            *("--threads", str(threads), "--slots", "2", "--log-format", "console"),
            *shlex.split(more),
        ]


@dataclass(frozen=True)
class SpecpairLoop:
    """A client of running services: greedy, a fixed number of new tokens, the end of sequence ignored."""

    name: str
    client: SpeculativeClient
    max_new_tokens: int
    runner: asyncio.Runner
    draft_length: int | None = None

    def run(self, prompt: Sequence[int]) -> Generation:
        """Continues a prompt and times it."""
        return self.runner.run(self._run(prompt))

    async def _run(self, prompt: Sequence[int]) -> Generation:
        params = SamplingParams(max_new_tokens=self.max_new_tokens, ignore_eos=True)
        began = time.perf_counter()
        result = await self.client.generate(prompt, params)
        seconds = time.perf_counter() - began
        stats = result.stats
        return Generation(result.token_ids, seconds, stats.rounds, stats.proposed, stats.accepted, _parts(stats))


@contextlib.contextmanager
def serve_loops(
    settings: ServiceSettings,
    names: Sequence[str],
    *,
    max_new_tokens: int,
    draft_length: int | None,
    progress: Callable[[str], None],
) -> Iterator[list[SpecpairLoop]]:
    """The loops of these names at services that run until the block ends.

    `draft_length` is for the draft model and for n-gram; None leaves it to the client.
    """
    with started(settings.flags("target"), settings.flags("draft")) as (target, draft), asyncio.Runner() as runner:
        runner.run(wait((target, draft), progress))
        drafts = {ALONE: "none", _NGRAM: "ngram", _PAIR: draft.address, _COMBINED: draft.address}
        clients = {
            name: runner.run(_connect(target.address, drafts[name], draft_length, lookup=name == _COMBINED))
            for name in names
        }
        try:
            yield [
                SpecpairLoop(name, client, max_new_tokens, runner, draft_length if name == _PAIR else None)
                for name, client in clients.items()
            ]
        finally:
            for client in clients.values():
                runner.run(client.aclose())


async def wait(services: Sequence[Service], progress: Callable[[str], None]) -> None:
    """Until all of them serve."""
    for service in services:
        await service.wait(lambda waited, sight: progress(f"{waited.role}: {sight}"))


async def _connect(target: str, draft: str, draft_length: int | None, *, lookup: bool) -> SpeculativeClient:
    """A client, made where its event loop runs."""
    return SpeculativeClient(target, draft, draft_length=draft_length, lookup=lookup)


def _parts(stats: Stats) -> dict[str, float]:
    if not stats.verifying_seconds:  # the target alone decodes in a loop of its own, of which the client sees no rounds
        return {}
    return {
        "proposing": stats.proposing_seconds,
        "drafting": stats.drafting_seconds,
        "verifying": stats.verifying_seconds,
        "judging": stats.judging_seconds,
        "queued": stats.queued_seconds,
        "wire": stats.wire_seconds,
    }
