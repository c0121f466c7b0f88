"""OpenTelemetry in a server: a span for each call, joined to the caller's trace, with its stages below it.

`opentelemetry-instrumentation-grpc` is not used: see docs/tracing.md for what its interceptors do to streams.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import structlog

from specpair.errors import InvalidRequestError
from specpair_runtime.serving.record import CallRecord, Value

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = ["FAULTS", "CallSpan", "Tracing", "configure_tracing"]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_EXPORTERS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
# gRPC statuses that are the service's fault, by the conventions for spans of servers.
FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}

# Seconds for the last spans when the process ends: a collector that is away must not keep it.
_FAREWELL = 3.0

_log = structlog.stdlib.get_logger("specpair")


class CallSpan:
    """The span of one call, the current one from its making to `end`."""

    def __init__(
        self, provider: TracerProvider, name: str, carried: Mapping[str, str], attributes: Mapping[str, str]
    ) -> None:
        from opentelemetry import context, propagate, trace

        self._tracer = provider.get_tracer("specpair")
        # Stages are timed by another clock than spans.
        self._wall_ns = time.time_ns() - time.perf_counter_ns()
        joined = propagate.extract(carried)
        self._span = self._tracer.start_span(name, joined, trace.SpanKind.SERVER, dict(attributes))
        self._context = trace.set_span_in_context(self._span)
        self._token = context.attach(self._context)
        known = self._span.get_span_context()
        self.trace_id = trace.format_trace_id(known.trace_id) if known.is_valid else ""

    def end(self, attributes: Mapping[str, Value], fault: str = "", record: CallRecord | None = None) -> None:
        """The call has ended, `fault` says how if that was the server's. To be called where the span was made."""
        from opentelemetry import context
        from opentelemetry.trace import StatusCode

        for name, watch in record.stages.items() if record is not None else ():
            for began_ns, ended_ns in list(watch.laps):
                stage = self._tracer.start_span(name, self._context, start_time=self._wall_ns + began_ns)
                stage.end(self._wall_ns + ended_ns)
        fields = record.fields() if record is not None else {}
        self._span.set_attributes({**attributes, **{f"specpair.{name}": value for name, value in fields.items()}})
        if fault:
            self._span.set_status(StatusCode.ERROR, fault)
        self._span.end()
        context.detach(self._token)


class Tracing:
    """Where a server's spans go."""

    def __init__(self, provider: TracerProvider, *, owned: bool = False) -> None:
        """`owned` is a provider that nobody else uses: it ends with the server."""
        self._provider = provider
        self._owned = owned

    def call(self, name: str, carried: Iterable[tuple[str, Any]], attributes: Mapping[str, str]) -> CallSpan:
        """A call begins, with what the caller has sent of its trace among other headers."""
        headers = {key: value for key, value in carried if isinstance(value, str)}
        return CallSpan(self._provider, name, headers, attributes)

    def grpc_call(self, method: str, metadata: Iterable[tuple[str, Any]] | None, request_id: str) -> CallSpan:
        """A call begins, of a method such as /specpair.v1.TargetService/Verify."""
        full = method.removeprefix("/")
        service, _, name = full.partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        return self.call(full, metadata or (), {**attributes, "specpair.request_id": request_id})

    def close(self) -> None:
        """Sends what has not been sent yet; blocks for a few seconds at most, while exporters would try for longer."""
        if not self._owned:
            return
        sending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        sending.start()
        sending.join(_FAREWELL)


def configure_tracing(service: str, *, wanted: bool) -> Tracing | None:
    """Sets OpenTelemetry's SDK up as the standard variables OTEL_... say; for mains.

    None if nobody wants traces: without `wanted` the variables have to name an endpoint. An SDK that is set up already,
    as by `opentelemetry-instrument`, is used as it is. `service` is the name of the service unless the variables say
    another. Raises InvalidRequestError naming `otel` if traces are `wanted` and cannot be had, or a variable is wrong.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if not (wanted or any(os.environ.get(name) for name in _ENDPOINTS)):
        return None
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        if wanted:
            raise InvalidRequestError("needs the extra: pip install 'specpair[otel]'", field="otel") from None
        _log.warning("no traces: they need the extra: pip install 'specpair[otel]'")
        return None
    if isinstance(there := trace.get_tracer_provider(), TracerProvider):
        return Tracing(there)
    # Resource.create reads OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME, which here have to go first.
    named = Resource.create()
    unnamed = str(named.attributes.get("service.name", "unknown_service")).startswith("unknown_service")
    resource = named.merge(Resource({"service.name": service})) if unnamed else named
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    try:
        for exporter in _exporters():
            provider.add_span_processor(BatchSpanProcessor(exporter))
    except InvalidRequestError:
        raise
    except Exception as error:  # of the SDK and of any exporter, each with kinds of its own
        raise InvalidRequestError(f"a variable OTEL_... is not understood: {error}", field="otel") from error
    trace.set_tracer_provider(provider)
    return Tracing(provider, owned=True)


def _exporters() -> list[SpanExporter]:
    """Those that OTEL_TRACES_EXPORTER names, by default OTLP. Raises InvalidRequestError."""
    found: list[SpanExporter] = []
    for name in os.environ.get("OTEL_TRACES_EXPORTER", "").split(",") or [""]:
        name = name.strip() or "otlp"
        if name == "none":
            continue
        if name == "otlp":
            protocol = next(filter(None, map(os.environ.get, _PROTOCOLS)), "grpc")
            name = _EXPORTERS.get(protocol.strip(), protocol)
        makers = list(entry_points(group="opentelemetry_traces_exporter", name=name))
        if not makers:
            raise InvalidRequestError(f"no exporter of traces is called {name!r}", field="otel")
        found.append(makers[0].load()())
    return found
