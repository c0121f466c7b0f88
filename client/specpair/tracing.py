"""Generations as OpenTelemetry traces: a span for each, one for each of its calls, and events for its rounds.

Only the API is used. Where that is not installed nothing is traced; where the application has set up no SDK, the calls
still carry the trace that the application itself is part of. Services that trace join by the metadata `traceparent`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specpair.errors import REQUEST_ID
from specpair.request import Call, RequestContext

if TYPE_CHECKING:
    from grpc import aio
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer, TracerProvider

    from specpair.pacing import Round

__all__ = ["request_contexts"]

# Rounds of a generation that are all told; behind them those whose number is a power of two. An SDK keeps 128 events
# of a span by default.
_ROUNDS = 32
_SPAN = "specpair.generate"


def request_contexts(provider: TracerProvider | None = None) -> Callable[[str], RequestContext]:
    """What makes the contexts of a client's generations, given their ids.

    `provider` None means the application's global one. Without the package opentelemetry-api nothing is traced.
    """
    # Here, so that the package is neither needed nor loaded by `import specpair`.
    try:
        from opentelemetry import trace
    except ImportError:
        return RequestContext
    tracer = trace.get_tracer("specpair", tracer_provider=provider)
    return lambda id: TracedRequest(id, tracer)


class TracedRequest(RequestContext):
    """A generation with a span of its own."""

    def __init__(self, id: str, tracer: Tracer) -> None:
        super().__init__(id)
        self._tracer = tracer
        self._span: Span | None = None
        self._context: Context | None = None
        self._rounds = 0

    def begin(self) -> None:
        from opentelemetry import trace

        self._span = span = self._tracer.start_span(_SPAN, attributes={"specpair.request_id": self.id})
        self._context = trace.set_span_in_context(span)
        self.recording = span.is_recording()
        if (known := span.get_span_context()).is_valid:
            self.trace_id = trace.format_trace_id(known.trace_id)

    def call(self, method: str, address: str) -> Call:
        from opentelemetry import propagate, trace

        service, _, name = method.partition("/")
        span = self._tracer.start_span(
            method,
            self._context,
            trace.SpanKind.CLIENT,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name, "server.address": address},
        )
        carried: dict[str, str] = {}
        propagate.inject(carried, trace.set_span_in_context(span, self._context))
        # Keys of gRPC's metadata are lower case.
        headers = ((key.lower(), value) for key, value in carried.items())
        return _TracedCall(((REQUEST_ID, self.id), *headers), span)

    def event(self, name: str, **attributes: str | int | float) -> None:
        if self._span is not None:
            self._span.add_event(name, attributes)

    def round(self, round: Round) -> None:
        self._rounds += 1
        if self._rounds <= _ROUNDS or not self._rounds & (self._rounds - 1):
            self.event(
                "round",
                round=self._rounds,
                source=round.source.value,
                proposed=round.proposed,
                accepted=round.accepted,
                propose_seconds=round.draft_seconds,
                verify_seconds=round.verify_seconds,
                forward_seconds=round.forward_seconds,
            )

    def end(self, status: str, fields: dict[str, Any]) -> None:
        from opentelemetry.trace import StatusCode

        if self._span is None:
            return
        self._span.set_attributes({f"specpair.{name}": value for name, value in fields.items()})
        if status not in ("OK", "CANCELLED"):
            self._span.set_status(StatusCode.ERROR, status)
        self._span.end()


@dataclass(frozen=True)
class _TracedCall(Call):
    span: Span

    def follow(self, call: aio.Call) -> None:
        # A session's call may outlive the turn that opened it.
        call.add_done_callback(self._ended)

    def _ended(self, call: Any) -> None:  # noqa: ANN401 - a call
        from opentelemetry.trace import StatusCode

        now = time.time_ns()
        try:
            # The status of a call that is done is there, though gRPC asks to be awaited for it: it never waits.
            with contextlib.closing(call.code()) as asked:
                asked.send(None)
        except StopIteration as told:
            code = told.value
            self.span.set_attribute("rpc.grpc.status_code", code.value[0])
            if code.name not in ("OK", "CANCELLED"):
                self.span.set_status(StatusCode.ERROR, code.name)
        finally:
            self.span.end(now)
