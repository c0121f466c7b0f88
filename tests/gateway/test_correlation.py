"""A request over HTTP, its generations and their calls are one request in logs and traces."""

from __future__ import annotations

import logging

from opentelemetry import trace

from specpair_gateway.app import create_app
from specpair_gateway.config import GatewayConfig
from specpair_runtime.serving.tracing import Tracing

from ..client.fakes import FakeTarget
from .serving import COMPLETIONS, ask, chat, client_of, completion, events


def ids(target):
    """Those of the requests that a target was sent."""
    return [start.request.id for start in target.starts]


def gateway(target, **options):
    """The application over a target."""
    return create_app(GatewayConfig(), client_of(target), **options)


def test_the_services_get_the_gateways_id():
    """All choices of a request have the id that the caller gave and gets back."""
    target = FakeTarget()
    answer = ask(gateway(target), COMPLETIONS, completion(n=3), {"x-request-id": "order-66"})
    assert answer.headers["x-request-id"] == "order-66"
    assert ids(target) == ["order-66"] * 3


def test_a_hostile_id_goes_nowhere():
    """The services get the one that was made up in its place."""
    target = FakeTarget()
    answer = ask(gateway(target), "/v1/chat/completions", chat(stream=True), {"x-request-id": 'x" level="critical'})
    assert events(answer)
    assert ids(target) == [answer.headers["x-request-id"]]
    assert len(ids(target)[0]) == 32


def test_a_request_is_a_span_with_its_generations_below(exporter, provider, caplog):
    """Joined to the trace of its caller, whose id the line of each generation has."""
    app = create_app(GatewayConfig(), client_of(FakeTarget(), tracer_provider=provider), tracing=Tracing(provider))
    with caplog.at_level(logging.INFO, "specpair.generation"):
        ask(app, COMPLETIONS, completion(n=2), {"traceparent": f"00-{5:032x}-{6:016x}-01", "x-request-id": "order-66"})
    *generations, request = exporter.get_finished_spans()
    assert (request.name, request.parent.span_id, request.context.trace_id) == ("POST", 6, 5)
    assert request.attributes["http.response.status_code"] == 200
    assert [span.name for span in generations] == ["specpair.generate"] * 2
    assert {span.parent.span_id for span in generations} == {request.context.span_id}
    assert {span.attributes["specpair.request_id"] for span in exporter.get_finished_spans()} == {"order-66"}
    assert [record.trace_id for record in caplog.records if record.name == "specpair.generation"] == [f"{5:032x}"] * 2


def test_the_framework_adds_no_spans(exporter, provider, monkeypatch):
    """With the process's own provider set up too a request has one span, and what it says that is wrong is in none."""
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    app = create_app(GatewayConfig(), client_of(FakeTarget()), tracing=Tracing(provider))
    assert ask(app, COMPLETIONS, completion(temperature="secret")).status_code == 400
    assert ask(app, COMPLETIONS, completion()).status_code == 200
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["POST", "specpair.generate", "POST"]
    assert "secret" not in str([span.to_json() for span in spans])


def test_health_is_no_span(exporter, provider):
    """Who looks whether the gateway is there fills no traces."""
    app = create_app(GatewayConfig(), client_of(FakeTarget()), tracing=Tracing(provider))
    assert ask(app, "/health").status_code == 200
    assert exporter.get_finished_spans() == ()
