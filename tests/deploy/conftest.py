"""Two real targets with the demo model, and the load balancers of deploy/ in front of them."""

from __future__ import annotations

import pytest

from ..e2e.conftest import launch, pytest_runtest_makereport  # noqa: F401 - pytest finds them here
from ..e2e.processes import DEMO
from .proxies import NAMES, Proxy

SLOTS = 8


@pytest.fixture(scope="session")
def targets(launch):  # noqa: F811
    """Two targets that compute the same; they start at once and are waited for when an address is asked for."""
    flags = [f"--model={DEMO / 'target'}", f"--slots={SLOTS}", "--max-length=512"]
    return [launch("target", *flags) for _ in range(2)]


@pytest.fixture(scope="session")
def balance(tmp_path_factory):
    """Starts load balancers: `balance("haproxy", address, address)`, see Proxy. All of them end with the session."""
    running = []

    def start(name, *addresses, **options):
        proxy = Proxy(name, tmp_path_factory.mktemp(name), addresses, **options)
        running.append(proxy)
        return proxy

    yield start
    for proxy in running:
        proxy.stop()


@pytest.fixture(scope="session", params=NAMES)
def proxy(request, targets, balance):
    """Each load balancer in front of both targets."""
    return balance(request.param, *(target.address for target in targets))
