"""Two targets and two drafts behind one address each, one of which is killed under load: nobody loses a token."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

import pytest

from specpair import SpeculativeClient

from ..e2e.processes import DEMO, Service, run, wait_for
from .load import WANTED, alone, check, together
from .proxies import NAMES

# Client-side balancing needs no program in between.
WAYS = [*NAMES, "round_robin"]
# Seconds in which a balancer notices what is back, generously.
_NOTICED = 30


@dataclass
class Replicas:
    """Two services of each kind."""

    targets: list[Service]
    drafts: list[Service]

    @property
    def all(self):
        """Targets and drafts."""
        return [*self.targets, *self.drafts]

    def revive(self):
        """Starts again what was killed, where it was, and waits until all are healthy."""
        for service in self.all:
            if not service.alive:
                service.restart()
        assert all(service.address for service in self.all)


@pytest.fixture(scope="module")
def replicas(launch):
    """They compute the same; a target has a slot for every client."""
    place = ["--max-length=320", f"--slots={len(WANTED)}"]
    made = Replicas(
        [launch("target", f"--model={DEMO / 'target'}", *place) for _ in range(2)],
        [launch("draft", f"--model={DEMO / 'draft'}", *place) for _ in range(2)],
    )
    made.revive()
    return made


@pytest.fixture(scope="module")
def expected(replicas):
    """What a target by itself says."""
    return run(alone(replicas.targets[0].address))


@pytest.fixture(scope="module", params=WAYS)
def addresses(request, replicas, balance):
    """Where clients find the targets, and where the drafts. All of them are alive."""
    replicas.revive()
    listed = [service.address for service in replicas.targets], [service.address for service in replicas.drafts]
    if request.param == "round_robin":
        return tuple("ipv4:" + ",".join(addresses) for addresses in listed)
    proxy = balance(request.param, *listed[0], drafts=listed[1])
    return proxy.address, proxy.draft_address


def calls(service, method):
    """How many calls of a service's method have ended so far, by its log."""
    return sum(str(entry.get("method")).endswith(f"/{method}") for entry in service.entries())


def busiest(services):
    """The service with most sessions."""
    return max(services, key=lambda service: service.info().slots_in_use)


async def found(replicas, addresses):
    """Waits until clients that come are led to every replica: balancers need a moment to see what is back."""
    before = [calls(service, "GetModelInfo") for service in replicas.all]
    async with asyncio.timeout(_NOTICED):
        for _ in itertools.count():
            async with SpeculativeClient(*addresses) as client:
                for _ in range(4):
                    await client.info()
            now = [calls(service, "GetModelInfo") for service in replicas.all]
            if all(late > early for late, early in zip(now, before, strict=True)):
                return


def test_undisturbed(replicas, addresses, expected):
    """Eight clients get what one gets alone, and their sessions are at both replicas of each service."""
    run(found(replicas, addresses))

    def sessions():
        return [calls(service, "Verify" if service.role == "target" else "Propose") for service in replicas.all]

    before = sessions()
    results = run(together(*addresses))
    check(results, expected)
    assert {result.stats.resumes for result in results} == {0}

    def ended():
        return [late - early for late, early in zip(sessions(), before, strict=True)]

    wait_for(lambda: sum(ended()) >= 2 * len(WANTED), 10, "every session ended")
    # Clients that balance by themselves do not know of each other: each begins anywhere.
    assert addresses[0].startswith("ipv4:") or min(ended()) >= 1


def test_nobody_loses_a_token(replicas, addresses, expected):
    """A draft that dies under load is done without, sessions of a target that dies go on at the other one behind their
    last token, what comes later begins there, and what was killed is used again when it is back."""
    run(found(replicas, addresses))
    results = run(together(*addresses, lambda: busiest(replicas.drafts).kill()))
    check(results, expected)
    assert {result.stats.resumes for result in results} == {0}

    results = run(together(*addresses, lambda: busiest(replicas.targets).kill()))
    check(results, expected)
    assert sum(result.stats.resumes for result in results) >= 1

    check(run(together(*addresses)), expected)

    replicas.revive()
    run(found(replicas, addresses))
