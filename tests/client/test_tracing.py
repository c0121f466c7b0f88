"""Generations as spans: with OpenTelemetry's API, without it, and without anybody who listens."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry import trace

from specpair import (
    Credentials,
    InvalidRequestError,
    SamplingParams,
    SpecpairError,
    SpeculativeClient,
    UnauthenticatedError,
    UnavailableError,
)
from specpair.grpc_transports import GrpcTarget
from specpair.messages import Start
from specpair.pacing import Round
from specpair.request import RequestContext
from specpair.results import Source
from specpair.tracing import request_contexts

from .. import virtual_time
from .fakes import FakeTarget

PROMPT = [3, 4, 5]
PARAMS = SamplingParams(max_new_tokens=14)
ROUND = Round(1, Source.NGRAM, 4, 4, 2, 0.001, 0.002, forward_seconds=0.001)


def generate(target=None, provider=None, **options):
    """One generation by prompt lookup."""

    async def work():
        transport = target or FakeTarget()
        async with SpeculativeClient(
            "target:1", "ngram", target_transport=transport, tracer_provider=provider, **options
        ) as client:
            return await client.generate(PROMPT, PARAMS, request_id="mine-1")

    return virtual_time.run(work())


def test_a_generation_is_a_span(exporter, provider):
    """With its id and its counts, an event for every round, and neither prompt nor text."""
    result = generate(provider=provider)
    (span,) = exporter.get_finished_spans()
    assert span.name == "specpair.generate"
    assert span.attributes["specpair.request_id"] == "mine-1"
    assert span.attributes["specpair.output_tokens"] == result.stats.output_tokens
    assert span.status.is_unset
    assert [event.attributes["accepted"] for event in span.events if event.name == "round"]
    assert result.text not in span.to_json()
    assert result.tokens[0].text not in span.to_json()


def test_it_is_part_of_what_its_caller_does(exporter, provider):
    """The span is below the one that is current where the generation begins."""
    with provider.get_tracer("test").start_as_current_span("outer") as outer:
        generate(provider=provider)
    inner = exporter.get_finished_spans()[0]
    assert inner.parent.span_id == outer.get_span_context().span_id


def test_a_failure_is_an_error_without_its_message(exporter, provider):
    """Its span says the status and the reason."""
    with pytest.raises(SpecpairError):
        generate(FakeTarget(breaks={2: UnavailableError("'secret'", reason="DRAINING")}), provider, resume_timeout=0.0)
    (span,) = exporter.get_finished_spans()
    assert (span.status.status_code, span.status.description) == (trace.StatusCode.ERROR, "UNAVAILABLE")
    assert span.attributes["specpair.reason"] == "DRAINING"
    assert "secret" not in span.to_json()


def test_a_resume_is_an_event(exporter, provider):
    """Two of them: the loss and the return."""
    generate(FakeTarget(breaks={3: UnavailableError("gone")}), provider)
    (span,) = exporter.get_finished_spans()
    events = [event for event in span.events if event.name != "round"]
    assert [event.name for event in events] == ["target lost", "resumed"]
    assert events[0].attributes["error"] == "UnavailableError"
    assert span.attributes["specpair.resumes"] == 1


def test_a_refused_turn_is_no_loss(exporter, provider):
    """A target that says no to a turn is there: no event says that it was lost."""

    async def work():
        target = FakeTarget(breaks={4: InvalidRequestError("no", field="extend.prompt")})
        async with (
            SpeculativeClient(
                "target:1", "ngram", target_transport=target, tracer_provider=provider, draft_length=0
            ) as client,
            client.session() as session,
        ):
            await session.generate(PROMPT, SamplingParams(max_new_tokens=3))
            with pytest.raises(InvalidRequestError):
                await session.generate(PROMPT, PARAMS)

    virtual_time.run(work())
    _, refused = exporter.get_finished_spans()
    assert refused.attributes["specpair.status"] == "INVALID_ARGUMENT"
    assert not [event for event in refused.events if event.name != "round"]


def test_a_call_that_cannot_be_made_leaves_no_span():
    """Where there is no token to be had nothing has begun that would have to end."""
    asked = []

    def token():
        raise UnauthenticatedError("none today")

    class Watched(RequestContext):
        def call(self, method, address):
            asked.append(method)
            return super().call(method, address)

    async def work():
        target = GrpcTarget("127.0.0.1:1", Credentials(token=token))
        with pytest.raises(UnauthenticatedError):
            await target.verify(Start("x", PARAMS, request=Watched("mine-1")))
        await target.close()

    virtual_time.run(work())
    assert asked == []


def test_events_are_bounded(exporter, provider):
    """All of the first rounds, and then ever fewer: an SDK drops what is too much, and would drop the wrong ones."""
    request = request_contexts(provider)("mine-1")
    request.begin()
    for _ in range(5000):
        request.round(ROUND)
    request.end("OK", {})
    (span,) = exporter.get_finished_spans()
    assert [event.attributes["round"] for event in span.events] == [*range(1, 33), 64, 128, 256, 512, 1024, 2048, 4096]
    assert span.dropped_events == 0


def test_a_call_carries_the_trace(exporter, provider):
    """In the metadata: the request id, and as W3C says which span the service's is to be below."""
    request = request_contexts(provider)("mine-1")
    request.begin()
    call = request.call("specpair.v1.TargetService/Verify", "127.0.0.1:50051")
    metadata = dict(call.metadata)
    span = call.span.get_span_context()
    assert metadata["x-request-id"] == "mine-1"
    assert metadata["traceparent"] == f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
    assert f"{span.trace_id:032x}" == request.trace_id


def test_nobody_listens():
    """Without an SDK nothing is recorded, and calls carry no trace but that which the caller is part of."""
    request = request_contexts(trace.NoOpTracerProvider())("mine-1")
    request.begin()
    assert not request.recording
    assert [key for key, _ in request.call("a.B/C", "x:1").metadata] == ["x-request-id"]
    known = trace.SpanContext(5, 6, is_remote=True, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(known)):
        request.begin()
    assert dict(request.call("a.B/C", "x:1").metadata)["traceparent"] == f"00-{5:032x}-{6:016x}-01"


def test_the_api_is_not_needed():
    """A client in whose environment the package is missing generates as ever, and its calls have their id."""
    code = """
import sys
sys.modules["opentelemetry"] = None
from specpair.tracing import request_contexts
from specpair.request import RequestContext
made = request_contexts()("mine-1")
assert type(made) is RequestContext, made
assert made.call("a.B/C", "x:1").metadata == (("x-request-id", "mine-1"),)
import asyncio, specpair
async def work():
    async with specpair.SpeculativeClient("127.0.0.1:1", "none", resume_timeout=0) as client:
        try:
            await client.generate("x", request_id="mine-1")
        except specpair.UnavailableError as error:
            return error.request_id
assert asyncio.run(work()) == "mine-1"
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_untraced_generation_costs_nothing_in_a_round():
    """Nothing is called for a round unless somebody records: the flag alone is looked at."""
    told = []

    class Watched(RequestContext):
        def round(self, round):
            told.append(round)

    async def work():
        async with SpeculativeClient("target:1", "ngram", target_transport=FakeTarget()) as client:
            client._contexts = Watched
            return await client.generate(PROMPT, PARAMS)

    assert virtual_time.run(work()).stats.rounds > 1
    assert told == []
