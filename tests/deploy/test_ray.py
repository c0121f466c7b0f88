"""Two replicas of each service under Ray Serve: the same tokens as alone, also when one is killed under load.

Ray is not part of the environment that tests run in by themselves: `make test-ray` adds it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specpair import SamplingParams
from specpair.grpc_transports import GrpcDraft, GrpcTarget
from specpair.messages import DraftStart

from ..e2e.processes import environment, run, wait_for
from .files import DEPLOY, ROOT
from .load import alone, check, together

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: make test-ray")

# Bounds that stand for "does not hang", in seconds: Ray starts eight processes, and four services load their models.
_START = 300
_REPLACED = 180
_STOP = 90
_ANSWER = 10
# Of each service, by the file.
_SLOTS = 8
_PORTS = 4


def free_ports():
    """The first of some ports in a row on which nothing listens."""
    while True:
        first = 20_000 + secrets.randbelow(10_000)
        try:
            for port in range(first, first + _PORTS):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return first


def serves(port):
    """Whether a service says so of itself."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER)
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


async def slots_in_use(role, port):
    """How many sessions a service has."""
    service = {"target": GrpcTarget, "draft": GrpcDraft}[role](f"127.0.0.1:{port}")
    try:
        return (await service.info(_ANSWER)).slots_in_use
    finally:
        await service.close()


class Cluster:
    """Ray with the applications of deploy/ray/demo.yaml, on other ports."""

    def __init__(self, place):
        config = yaml.safe_load((DEPLOY / "ray/demo.yaml").read_text())
        self.ports, self.metrics = {}, {}
        for application in config["applications"]:
            arguments = application["args"]
            first = free_ports()
            self.ports[application["name"]] = range(first, first + _PORTS)
            arguments["ports"] = f"{first}-{first + _PORTS - 1}"
            first = free_ports()
            self.metrics[application["name"]] = range(first, first + _PORTS)
            arguments["metrics_listen"] = f"127.0.0.1:{first}-{first + _PORTS - 1}"
            arguments["cpus"] = 0.4  # of the two that Ray thinks there are: five replicas
            if application["name"] == "draft":
                arguments |= {"replicas": [2, 3], "upscale_delay": 1, "downscale_delay": 1}
        file = Path(place) / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        self.log = Path(place) / "cluster.log"
        self.logs = Path(place) / "session_latest/logs"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.deploy.ray_cluster", place, file],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(
                    RAY_AUTH_MODE="token",
                    RAY_AUTH_TOKEN=secrets.token_hex(32),
                    RAY_USAGE_STATS_ENABLED="0",
                    RAY_worker_niceness="0",  # as services have it that nobody else starts
                    RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S="1",
                ),
                start_new_session=True,
            )

    @property
    def everything(self):
        """Every process of it that there is."""
        driver = psutil.Process(self.process.pid)
        return [driver, *driver.children(recursive=True)]

    def addresses(self, role):
        """One address for whatever replicas of a service there are: those ports at which nobody is are passed over."""
        return "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in self.ports[role])

    def services(self, role, ports=None):
        """The service processes that listen, by port: that of gRPC unless others are asked for."""
        found = {}
        for process in self.everything:
            try:
                if f"specpair_{role}" in process.cmdline():
                    for connection in process.net_connections("tcp"):
                        port = connection.laddr.port if connection.status == psutil.CONN_LISTEN else None
                        if port in (ports or self.ports[role]):
                            found[port] = process
            except psutil.NoSuchProcess:
                pass
        return found

    def complete(self, role):
        """Both services of a role when both serve, else nothing."""
        assert self.process.poll() is None, self.log.read_text(errors="replace")
        services = self.services(role)
        return services if sum(map(serves, services)) == 2 else None

    def busiest(self, role):
        """The service with most sessions."""
        services = self.services(role)
        return services[max(services, key=lambda port: run(slots_in_use(role, port)))]

    def lines(self, event):
        """What services have logged of an event."""
        logs = [log.read_text(errors="replace") for log in self.logs.glob("worker-*.err")]
        return [line for log in logs for line in log.splitlines() if f'"event": "{event}"' in line]

    def stop(self):
        """Ends it as an operator would, and makes sure that nothing is left of it. Returns its exit status."""
        left = self.everything if self.process.poll() is None else []
        self.process.stdin.close()
        try:
            status = self.process.wait(_STOP)
            _, alive = psutil.wait_procs(left, _STOP)
            assert not alive, f"left behind: {alive}"
            return status
        finally:
            for process in left:
                if process.is_running():
                    process.kill()


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this machine alone, with two replicas of each service."""
    # Sockets lie below, whose paths are short by law.
    with tempfile.TemporaryDirectory(prefix="specpair-ray-", dir="/tmp", ignore_cleanup_errors=True) as place:
        made = Cluster(place)
        try:
            wait_for(
                lambda: "running" in made.log.read_text() or made.process.poll(), _START, "Ray and its applications"
            )
            assert made.process.poll() is None, made.log.read_text(errors="replace")
            yield made
        finally:
            if made.process.poll() is None:
                made.stop()


@pytest.fixture(scope="module")
def expected(cluster):
    """What one target says to one client after the other."""
    return run(alone(f"127.0.0.1:{min(cluster.services('target'))}"))


def test_the_same_tokens(cluster, expected):
    """Eight clients of two targets and two drafts get what one gets alone, each with a draft, none disturbed."""
    results = run(together(cluster.addresses("target"), cluster.addresses("draft")))
    check(results, expected)
    assert {result.stats.resumes for result in results} == {0}
    assert {result.stats.proposer for result in results} == {"model"}


def test_metrics(cluster):
    """Every replica serves metrics of its own, at a port that no other one on its machine has."""
    for role, ports in cluster.metrics.items():
        services = cluster.services(role, ports)
        assert len(services) == len({process.pid for process in services.values()}) == 2
        for port in services:
            assert f'service="{role}"' in httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=_ANSWER).text


@pytest.mark.parametrize("victim", ["replica", "service"])
def test_one_of_each_is_killed(cluster, expected, victim):
    """Nobody loses a token when a target and a draft are killed under load, and Serve puts others in their place.

    It is the same whether Ray's process is killed, which takes the service along, or the service alone.
    """
    services = {role: wait_for(lambda role=role: cluster.complete(role), _REPLACED, role) for role in cluster.ports}
    dying = []

    def kill():
        dying.extend(cluster.busiest(role) for role in cluster.ports)
        for process in dying:
            os.kill(process.ppid() if victim == "replica" else process.pid, signal.SIGKILL)

    results = run(together(cluster.addresses("target"), cluster.addresses("draft"), kill))
    check(results, expected)
    assert sum(result.stats.resumes for result in results) >= 1
    gone, _ = psutil.wait_procs(dying, _STOP)
    assert len(gone) == len(dying) == 2
    for role, before in services.items():
        found = wait_for(lambda role=role: cluster.complete(role), _REPLACED, f"two replicas of the {role} again")
        assert len({process.pid for process in found.values()} & {process.pid for process in before.values()}) == 1


def test_scaling(cluster):
    """When all slots are in use there is soon a replica more, and when none is in use that is drained again."""
    services = wait_for(lambda: cluster.complete("draft"), _REPLACED, "two drafts")
    start = DraftStart((3, 4, 5), SamplingParams())

    async def crowded():
        drafts = [GrpcDraft(f"127.0.0.1:{port}") for port in services]
        try:
            streams = [await draft.propose(start) for draft in drafts for _ in range(_SLOTS)]
            for stream in streams:
                await stream.receive()
            await asyncio.to_thread(wait_for, lambda: len(cluster.services("draft")) == 3, _REPLACED, "a third draft")
        finally:
            for draft in drafts:
                await draft.close()

    run(crowded(), within=_REPLACED + 30)
    wait_for(lambda: len(cluster.services("draft")) == 2, _REPLACED, "two drafts again")
    wait_for(lambda: len(cluster.lines("stopped")) == 1, _STOP, "the third one drained")


def test_the_end(cluster):
    """What serves when Serve shuts down is drained and ends by itself, and nothing is left behind."""
    for role in cluster.ports:
        wait_for(lambda role=role: cluster.complete(role), _REPLACED, role)
    before = len(cluster.lines("stopped"))
    assert cluster.stop() == 0
    assert len(cluster.lines("stopped")) - before == 4
