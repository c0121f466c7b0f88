"""What every service counts: calls, its phase, and the listener that shows it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import urllib.error
import urllib.request

import grpc
import pytest
from prometheus_client import CollectorRegistry, Gauge

from specpair.errors import UnavailableError
from specpair.v1 import common_pb2, target_pb2
from specpair_runtime.serving import ServiceStatus
from specpair_runtime.serving.calls import Calls
from specpair_runtime.serving.config import ServiceConfig
from specpair_runtime.serving.metrics import CallMetrics, describe_process, watch_phase
from specpair_runtime.serving.metrics_listener import MetricsListener

SERVICE = "specpair.v1.TargetService"
INFO = target_pb2.TargetServiceGetModelInfoRequest()


@pytest.fixture
def registry():
    return CollectorRegistry()


def known(registry, calls=None):
    """Metrics of calls that know the target's methods."""
    metrics = CallMetrics(registry, calls or Calls())
    metrics.know([SERVICE, "specpair.test.NoDescriptor"])
    return metrics


def value(registry, name, **labels):
    """One sample; None if it is not there."""
    return registry.get_sample_value(name, labels)


def local_ipv6():
    """Whether this machine can listen on ::1."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


class TestCalls:
    """Calls by method and outcome."""

    def test_by_method_and_code(self, registry):
        """A call is counted under its method's and its status' names, and timed under its method's."""
        metrics = known(registry)
        metrics.ended(f"/{SERVICE}/Verify", "OK", 2.0, "")
        metrics.ended(f"/{SERVICE}/Verify", "RESOURCE_EXHAUSTED", 1.0, "QUEUE_FULL")
        metrics.ended("/grpc.health.v1.Health/Check", "OK", 0.002, "")
        assert value(registry, "specpair_requests_total", method="TargetService/Verify", code="OK") == 1
        assert value(registry, "specpair_requests_total", method="TargetService/Verify", code="RESOURCE_EXHAUSTED") == 1
        assert value(registry, "specpair_requests_total", method="Health/Check", code="OK") == 1
        assert value(registry, "specpair_request_duration_seconds_sum", method="TargetService/Verify") == 3.0
        assert value(registry, "specpair_refusals_total", reason="QUEUE_FULL") == 1

    def test_methods_that_callers_make_up(self, registry):
        """They are counted as one, whatever they are called, with and without tokens in the way."""
        metrics = known(registry)
        for name in ("/a/b", "/grpc.reflection.evil/x", "", f"/{SERVICE}/Nothing", "/grpc.health.v1.Health/Nothing"):
            metrics.ended(name, "UNAUTHENTICATED", 0.0, "")
        assert value(registry, "specpair_requests_total", method="other", code="UNAUTHENTICATED") == 4
        assert value(registry, "specpair_requests_total", method="ServerReflection", code="UNAUTHENTICATED") == 1

    def test_failures_are_there_from_the_start(self, registry):
        """Series that alerts watch begin at 0: of one that begins at 1 Prometheus sees no increase."""
        known(registry)
        for reason in ("ENGINE_FAILED", "NON_FINITE_LOGITS", "OUT_OF_MEMORY", "QUEUE_FULL", "KV_SLOTS_EXHAUSTED"):
            assert value(registry, "specpair_refusals_total", reason=reason) == 0
        assert value(registry, "specpair_requests_total", method="TargetService/Verify", code="INTERNAL") == 0

    def test_running(self, registry):
        """Calls under way are those of the moment."""

        async def check():
            calls = Calls()
            known(registry, calls)
            async with calls.running(), calls.running():
                assert value(registry, "specpair_requests_running") == 2
            assert value(registry, "specpair_requests_running") == 0

        asyncio.run(check())


def test_the_phase_is_the_moments(registry):
    """Exactly one phase is 1, the one that the status says."""
    status = ServiceStatus()
    watch_phase(registry, status)
    for phase in (common_pb2.PHASE_LOADING, common_pb2.PHASE_READY, common_pb2.PHASE_DRAINING):
        status.set(phase)
        [family] = registry.collect()
        assert {sample.labels["phase"]: sample.value for sample in family.samples if sample.value} == {
            common_pb2.Phase.Name(phase).removeprefix("PHASE_").lower(): 1
        }


def test_the_process(registry):
    """What runs is described in words of the configuration, and what it takes of the machine is there."""
    describe_process(registry, service="target", model="models/demo/target")
    [info] = [family for family in registry.collect() if family.name == "specpair"]
    assert info.samples[0].labels.items() >= {"service": "target", "model": "models/demo/target"}.items()
    assert value(registry, "process_resident_memory_bytes") > 0


class TestListener:
    """The HTTP server."""

    def fetch(self, listener, **headers):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(f"http://{listener.address}/metrics", headers=headers)
        with opener.open(request, timeout=10) as answer:
            return answer.headers["Content-Type"], answer.read().decode()

    @pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
    def test_serves_its_registry(self, registry, host):
        """A port of 0 takes a free one; the text is Prometheus', of this registry alone."""
        if host == "[::1]" and not local_ipv6():
            pytest.skip("this machine has no IPv6")
        Gauge("specpair_test", "A test.", registry=registry).set(3)
        with MetricsListener(f"{host}:0", registry) as listener:
            kind, text = self.fetch(listener)
        assert kind.startswith("text/plain")
        assert text.splitlines() == ["# HELP specpair_test A test.", "# TYPE specpair_test gauge", "specpair_test 3.0"]

    def test_nothing_is_served_unasked(self, registry):
        """Without an address there is no listener and no thread."""
        before = threading.active_count()
        with MetricsListener("", registry) as listener:
            assert listener.address == ""
            assert threading.active_count() == before

    def test_ends(self, registry):
        """Behind the block nobody listens."""
        with MetricsListener("127.0.0.1:0", registry) as listener:
            self.fetch(listener)
        with pytest.raises(urllib.error.URLError):
            self.fetch(listener)

    def test_an_address_in_use(self, registry):
        """Is refused under the name of the setting."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(UnavailableError, match="cannot listen on") as refused:
                MetricsListener(f"127.0.0.1:{port}", registry)
        assert refused.value.field == "metrics_listen"

    def test_a_client_that_says_nothing_holds_nobody_up(self, registry):
        """A connection without a request does not keep others from being answered."""
        with MetricsListener("127.0.0.1:0", registry) as listener:
            host, _, port = listener.address.rpartition(":")
            with socket.create_connection((host, int(port))):
                assert self.fetch(listener)[1] == ""

    def test_a_client_that_goes_away_is_no_news(self, registry, capfd):
        """A connection that is reset, as by a probe of the port, puts nothing between the lines of the log."""
        with MetricsListener("127.0.0.1:0", registry) as listener:
            host, _, port = listener.address.rpartition(":")
            with socket.create_connection((host, int(port))) as rude:
                rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Its thread was started before the next one's.
            self.fetch(listener)
            for thread in threading.enumerate():
                if "process_request_thread" in thread.name:
                    thread.join(10)
        assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("listen", ["9464", "unix:/tmp/metrics", "127.0.0.1:port", ":1"])
def test_addresses_that_cannot_be(listen):
    """--metrics-listen is HOST:PORT or nothing."""
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        ServiceConfig(metrics_listen=listen)


def test_a_service_counts_its_calls(running, registry):
    """What the server answers is counted in the registry that it is given, refusals and failures by their reason."""

    async def check():
        async with running(registry=registry) as service:
            await service.until(lambda: service.status.phase == common_pb2.PHASE_READY)
            await service.stub.GetModelInfo(INFO)
            prompt = common_pb2.Prompt(text="invalid")
            with pytest.raises(grpc.aio.AioRpcError):
                await service.stub.Tokenize(target_pb2.TokenizeRequest(prompt=prompt))
            name = "specpair_requests_total"
            counted = [("GetModelInfo", "OK"), ("Tokenize", "INVALID_ARGUMENT")]
            await service.until(
                lambda: all(
                    value(registry, name, method=f"TargetService/{method}", code=code) == 1 for method, code in counted
                )
            )
            assert value(registry, "specpair_refusals_total", reason="NOT_SO") == 1

    asyncio.run(check())
