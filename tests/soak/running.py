"""A soak: clients, a pair that is killed again and again, a pair that is left alone, and gauges on all of them."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import importlib.metadata
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specpair import SpeculativeClient

from ..e2e.processes import Service
from .chaos import Chaos, Victim
from .clients import ask_all
from .gauges import Life, Trend, trends
from .jobs import jobs
from .tally import Tally


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    seconds: float
    """At least. It goes on until both services have been killed, too."""
    interval: float = 10.0
    """Seconds between two kills."""
    clients: int = 8
    steady_clients: int = 2
    """Of the pair that is left alone."""
    texts: int = 8
    sample_every: float = 5.0
    """Seconds."""


@dataclass
class Outcome:
    """What came of it."""

    plan: Plan
    disturbed: Tally = field(default_factory=Tally)
    steady: Tally = field(default_factory=Tally)
    events: Counter[str] = field(default_factory=Counter)
    trends: dict[str, list[Trend]] = field(default_factory=dict)
    lives: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def faults(self) -> list[str]:
        """What must not be: other tokens, errors without a type, a pair left alone that lost anything, no flat line."""
        found = self.disturbed.faults() + self.steady.faults()
        lost = self.steady.errors.total()
        found += [f"{lost} losses on the pair that was left alone: {dict(self.steady.errors)}"] if lost else []
        for name, all_trends in self.trends.items():
            for trend in all_trends:
                if trend.judged and not trend.flat:
                    found.append(f"{name}: {trend.metric} grew by {trend.growth:.1f}, above {trend.allowed:.1f}")
        return found

    def summary(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "version": importlib.metadata.version("specpair"),
            "date": datetime.date.today().isoformat(),
            **asdict(self.plan),
            "events": dict(self.events),
            "disturbed": self.disturbed.summary(),
            "steady": self.steady.summary(),
            "trends": {
                name: {trend.metric: trend.summary() for trend in all_trends}
                for name, all_trends in self.trends.items()
            },
            "lives": self.lives,
            "faults": self.faults(),
        }


async def soak(plan: Plan, target: Service, draft: Service, models: tuple[Path, Path], logs: Path) -> Outcome:
    """Runs a plan. `target` and `draft` are left alone; a second pair on the same `models` is not.

    Raises AssertionError when a service does not come back, or keeps a slot when all clients are gone.
    """
    outcome = Outcome(plan)
    async with SpeculativeClient(target.address, "none") as client:
        known = await jobs(client, plan.texts)
    flags = ("--slots=6", "--max-length=512")
    with (
        Victim("target", logs, f"--model={models[0]}", *flags) as killed_target,
        Victim("draft", logs, f"--model={models[1]}", *flags) as killed_draft,
    ):
        chaos = Chaos(killed_target, killed_draft, plan.interval)
        begun = time.monotonic()

        outcome.events = chaos.events
        left = {"client": os.getpid(), "target": target.process.pid, "draft": draft.process.pid}
        steady = {name: Life(pid) for name, pid in left.items()}
        async with (
            _meanwhile(chaos.rage()) as raging,
            _meanwhile(_sample(plan, steady, killed_target, killed_draft)) as sampling,
        ):

            def go_on() -> bool:
                enough = time.monotonic() - begun >= plan.seconds and chaos.rounds
                return not (enough or raging.done() or sampling.done())

            addresses = killed_target.proxy.address, killed_draft.proxy.address
            await asyncio.gather(
                ask_all(*addresses, plan.clients, known, outcome.disturbed, go_on),
                ask_all(target.address, draft.address, plan.steady_clients, known, outcome.steady, go_on),
            )
        for service in (killed_target, killed_draft):
            await asyncio.to_thread(service.wait_until_free)
        outcome.trends = {name: trends(life) for name, life in steady.items()}
        outcome.lives = {
            service.role: [life.last() for life in service.lives] for service in (killed_target, killed_draft)
        }
    return outcome


async def _sample(plan: Plan, steady: dict[str, Life], *victims: Victim) -> None:
    while True:
        for life in (*steady.values(), *(victim.lives[-1] for victim in victims)):
            life.measure()
        await asyncio.sleep(plan.sample_every)


@contextlib.asynccontextmanager
async def _meanwhile(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Work without end beside the block, unless it fails; that failure is the block's."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
