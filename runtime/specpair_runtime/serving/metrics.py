"""What Prometheus reads of every service: its calls and its phase.

Every service has a registry of its own, made in its main. Labels have values that the service itself knows beforehand:
nothing that a caller sends becomes a label, so that the number of series is bounded and nobody's data is in them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

from google.protobuf import descriptor_pool
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)

from specpair.v1 import common_pb2
from specpair_runtime.serving.calls import Calls
from specpair_runtime.serving.health import Health
from specpair_runtime.serving.status import ServiceStatus

__all__ = ["CallMetrics", "describe_process", "watch_phase"]

# Seconds, from a health check to a session of some turns.
_CALL_SECONDS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_REFLECTION = "/grpc.reflection."
_OTHER = "other"
# Series that are there from the start, at 0: of one that begins at 1 Prometheus does not see the first increase.
_REASONS = (
    "KV_SLOTS_EXHAUSTED",
    "QUEUE_FULL",
    "SESSION_LIMIT",
    "OUT_OF_MEMORY",
    "NON_FINITE_LOGITS",
    "ENGINE_FAILED",
    "NOT_READY",
    "DRAINING",
    "FAILED",
    "SESSION_EXPIRED",
    "MALFORMED_MESSAGE",
)
_CODES = ("OK", "INTERNAL", "UNKNOWN", "DATA_LOSS", "RESOURCE_EXHAUSTED", "UNAVAILABLE")


class CallMetrics:
    """Counts and times a server's calls by method and outcome."""

    def __init__(self, registry: CollectorRegistry | None, calls: Calls) -> None:
        self._methods: dict[str, str] = {}
        self._ended = Counter(
            "specpair_requests",
            "Calls that have ended, by method and gRPC status.",
            ["method", "code"],
            registry=registry,
        )
        self._seconds = Histogram(
            "specpair_request_duration_seconds",
            "Seconds from a call's begin to its end; that of a stream is the end of its session.",
            ["method"],
            buckets=_CALL_SECONDS,
            registry=registry,
        )
        self._reasons = Counter(
            "specpair_refusals",
            "Calls that ended with an error that has a reason, by reason (see docs/operation.md).",
            ["reason"],
            registry=registry,
        )
        for reason in _REASONS:
            self._reasons.labels(reason)
        running = Gauge(
            "specpair_requests_running", "Calls under way; those of health do not count.", registry=registry
        )
        running.set_function(lambda: calls.count)

    def know(self, services: Iterable[str]) -> None:
        """The methods of these services are counted by name, all others, which any caller can make up, as one."""
        for service in {*services, Health.SERVICE}:
            with suppress(KeyError):  # one without a descriptor
                for method in descriptor_pool.Default().FindServiceByName(service).methods:
                    name = f"{service.rpartition('.')[2]}/{method.name}"
                    self._methods[f"/{service}/{method.name}"] = name
                    for code in _CODES:
                        self._ended.labels(name, code)

    def ended(self, method: str, code: str, seconds: float, reason: str) -> None:
        """A call of a method, by its full name, has ended with a status code's name."""
        name = self._methods.get(method) or ("ServerReflection" if method.startswith(_REFLECTION) else _OTHER)
        self._ended.labels(name, code).inc()
        self._seconds.labels(name).observe(seconds)
        if reason:
            self._reasons.labels(reason).inc()


def describe_process(registry: CollectorRegistry, **labels: str) -> None:
    """Registers what runs here, in words of its configuration, and what it takes of the machine. For mains."""
    # A series for every series that says since when it counts: Prometheus knows that from a reset.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    Info("specpair", "What runs here.", registry=registry).info(
        {"version": importlib.metadata.version("specpair"), **labels}
    )
    ProcessCollector(registry=registry)


def watch_phase(registry: CollectorRegistry, status: ServiceStatus) -> None:
    """Registers where a service stands between start and stop."""
    phases = Gauge(
        "specpair_phase", "1 for the phase that the service is in, 0 for the others.", ["phase"], registry=registry
    )
    for name, phase in common_pb2.Phase.items():
        if phase != common_pb2.PHASE_UNSPECIFIED:
            phases.labels(name.removeprefix("PHASE_").lower()).set_function(partial(_stands, status, phase))


def _stands(status: ServiceStatus, phase: common_pb2.Phase.ValueType) -> float:
    return float(status.phase == phase)
