"""A server's calls as spans, and how a process is told to export them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from specpair import errors
from specpair_runtime.serving import CallInterceptor, Stopwatch, annotate, annotate_at_end, stage
from specpair_runtime.serving.record import CallRecord, timed
from specpair_runtime.serving.tracing import Tracing, configure_tracing

CALLER = f"00-{5:032x}-{6:016x}-01"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter):
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    yield Tracing(made)
    made.shutdown()


class _Servicer:
    """A stream that fails as its first request says, else counts."""

    def __init__(self):
        self.current = trace.INVALID_SPAN
        self.watch = Stopwatch()

    async def talk(self, requests, context):
        self.current = trace.get_current_span()
        annotate(rounds=3)
        annotate_at_end(lambda: {"accepted": 2})
        stage("prefill", self.watch)
        with timed("queue"):
            await asyncio.sleep(0.01)
        self.watch.start()
        await asyncio.sleep(0.01)
        self.watch.stop()
        async for request in requests:
            if request == b"wrong":
                raise errors.InvalidRequestError("'secret' is wrong", field="start.sampling.logit_bias[7]")
            if request == b"crash":
                raise RuntimeError("secret")
            if request == b"full":
                raise errors.OverloadedError("full", reason="QUEUE_FULL")
            yield request


async def _talk(servicer, interceptor, *requests, metadata=()):
    """The call to its end; returns its status."""
    server = grpc.aio.server(interceptors=[interceptor])
    handler = grpc.stream_stream_rpc_method_handler(servicer.talk)
    handlers = grpc.method_handlers_generic_handler("test.Talk", {"Run": handler})
    server.add_generic_rpc_handlers([handlers])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.stream_stream("/test.Talk/Run")(iter(requests), metadata=metadata)
            try:
                async for _ in call:
                    pass
            except grpc.RpcError:
                pass
            return await call.code()
    finally:
        await server.stop(1)


def talk(tracing, *requests, metadata=()):
    """The servicer and the call's log line, after one call."""
    servicer = _Servicer()
    with capture_logs(processors=[merge_contextvars]) as logs:
        asyncio.run(_talk(servicer, CallInterceptor(tracing=tracing), *requests, metadata=metadata))
    (line,) = [entry for entry in logs if entry["event"] == "call"]
    return servicer, line


def test_a_call_is_a_span_below_its_callers(tracing, exporter):
    """Joined by `traceparent`, current in the handler, with what the log line has and the stages below it."""
    servicer, line = talk(tracing, b"x", metadata=(("traceparent", CALLER), ("x-request-id", "mine-1")))
    prefill, queue, span = sorted(exporter.get_finished_spans(), key=lambda found: found.name)
    assert (span.name, span.kind) == ("test.Talk/Run", trace.SpanKind.SERVER)
    assert (span.context.trace_id, span.parent.span_id) == (5, 6)
    assert servicer.current.get_span_context() == span.context
    assert span.attributes["specpair.request_id"] == "mine-1"
    assert (span.attributes["specpair.rounds"], span.attributes["specpair.accepted"]) == (3, 2)
    assert span.attributes["rpc.grpc.status_code"] == 0
    assert span.status.is_unset
    assert (queue.name, prefill.name) == ("queue", "prefill")
    for part in (queue, prefill):
        assert part.parent.span_id == span.context.span_id
        assert span.start_time <= part.start_time < part.end_time <= span.end_time
    assert (line["request_id"], line["trace_id"]) == ("mine-1", f"{5:032x}")
    assert (line["rounds"], line["accepted"]) == (3, 2)
    assert line["queue_seconds"] == pytest.approx((queue.end_time - queue.start_time) / 1e9, abs=1e-6)


@pytest.mark.parametrize(
    ("said", "number", "fault"),
    [(b"wrong", 3, ""), (b"full", 8, ""), (b"crash", 13, "INTERNAL")],
)
def test_only_the_services_faults_are_errors(tracing, exporter, said, number, fault):
    """A span has its call's status; no message of an exception is in it, and no number from a field's path."""
    talk(tracing, said)
    span = exporter.get_finished_spans()[-1]
    assert span.attributes["rpc.grpc.status_code"] == number
    assert (span.status.description or "") == fault
    assert span.attributes.get("specpair.reason") == ("QUEUE_FULL" if said == b"full" else None)
    assert span.attributes.get("specpair.field") == ("start.sampling.logit_bias[]" if said == b"wrong" else None)
    assert "secret" not in span.to_json()


def test_without_tracing_the_line_is_the_same():
    """But for the trace's id."""
    _, line = talk(None, b"full", metadata=(("traceparent", CALLER),))
    assert "trace_id" not in line
    assert (line["status"], line["reason"], line["rounds"]) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 3)
    assert line["queue_seconds"] >= 0.01


def test_stages_add_up():
    """What happens several times is summed; of many laps the latest are kept; what has not ended does not count."""
    record, watch = CallRecord.open(), Stopwatch()
    stage("prefill", watch)
    watch.stop()
    for _ in range(20):
        watch.start()
        watch.start()
        watch.stop()
    watch.start()
    assert len(watch.laps) == 8
    assert record.fields() == {"prefill_seconds": round(watch.seconds, 6)}
    assert watch.seconds > 0


@pytest.fixture
def configured(monkeypatch):
    """Configures as a main does with this environment; the process's one global provider is left alone."""
    monkeypatch.setattr(trace, "set_tracer_provider", lambda provider: None)
    made = []

    def configure(env, wanted=True):
        for name in [name for name in os.environ if name.startswith("OTEL_")]:
            monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        made.append(configure_tracing("specpair-target", wanted=wanted))
        return made[-1]

    yield configure
    for one in made:
        if one is not None:
            one.close()


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_TIMEOUT": "5"}


@pytest.mark.parametrize(
    ("env", "wanted", "expected"),
    [
        ({}, False, False),
        (ENDPOINT, False, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9"}, False, True),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, False, True),
        ({}, True, True),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "true"}, True, False),
    ],
)
def test_who_wants_traces(configured, env, wanted, expected):
    """Who says so, or names an endpoint, unless the SDK is disabled."""
    assert (configured(env, wanted) is not None) == expected


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({}, "specpair-target"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=theirs"}, "theirs"),
    ],
)
def test_what_a_service_is_called(configured, env, name):
    """As the variables say, else as its command."""
    tracing = configured({**env, "OTEL_TRACES_EXPORTER": "none"})
    assert tracing._provider.resource.attributes["service.name"] == name


def test_another_exporter_and_the_last_spans():
    """Any exporter that is installed can be named; what waits is sent when the process ends."""
    code = """
from specpair_runtime.serving.tracing import configure_tracing
made = configure_tracing("specpair-target", wanted=True)
made.grpc_call("/a.B/C", (), "mine-1").end({})
made.close()
"""
    env = {"OTEL_TRACES_EXPORTER": "console"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert '"specpair.request_id": "mine-1"' in done.stdout


def test_an_exporter_that_is_not_there(configured):
    """Is named, when the process begins."""
    with pytest.raises(errors.InvalidRequestError, match="zipkin") as refused:
        configured({"OTEL_TRACES_EXPORTER": "zipkin"})
    assert refused.value.field == "otel"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
    ],
)
def test_a_variable_that_is_wrong(configured, name, value):
    """It ends the start under the name of the setting, like every other one, instead of with a traceback."""
    with pytest.raises(errors.InvalidRequestError, match="OTEL_") as refused:
        configured({**ENDPOINT, name: value})
    assert refused.value.field == "otel"


@pytest.mark.parametrize("wanted", [True, False])
def test_without_the_extra(configured, monkeypatch, wanted):
    """Who asks for traces is told what to install; who only has the variables in its environment runs without."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    if wanted:
        with pytest.raises(errors.InvalidRequestError, match="specpair\\[otel\\]"):
            configured({})
        return
    with capture_logs() as logs:
        assert configured(ENDPOINT, wanted=False) is None
    assert [entry["log_level"] for entry in logs] == ["warning"]


def test_a_collector_that_is_away_keeps_no_process(configured):
    """The end waits for the last spans a few seconds, however long the exporter would try."""
    tracing = configured(ENDPOINT)
    tracing.grpc_call("/a.B/C", (), "mine-1").end({})
    began = time.monotonic()
    tracing.close()
    assert time.monotonic() - began < 6
