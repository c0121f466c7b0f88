"""One generation, three processes: one request id in all of their logs, and one trace."""

from __future__ import annotations

import asyncio
import logging
import re
from itertools import pairwise
from pathlib import Path

import grpc
import pytest

from specpair import InvalidRequestError, SamplingParams, SpeculativeClient
from specpair.v1 import common_pb2, target_pb2, target_pb2_grpc

from .collector import Collector
from .conftest import BF16_LENGTH
from .processes import DEMO, UNHURRIED, run, wait_for

ROOT = Path(__file__).parents[2]
PROMPT = "def quicksort(secret_values):\n"
PARAMS = SamplingParams(max_new_tokens=48, ignore_eos=True, temperature=0.8, seed=5)
# The draft proposes in every round, however busy the machine is.
STEADY = {"lookup": False, "draft_length": 4, "draft_timeout": UNHURRIED}
# Seconds within which what is sent by the way has arrived.
SOON = 20
# Seconds that stand for "comes back": a target loads its model on a busy machine.
PATIENCE = 180.0


@pytest.fixture(scope="module")
def collector():
    found = Collector()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def target(launch, collector):
    """A target that sends its traces to the collector."""
    flags = f"--model={DEMO / 'target'}", "--slots=2", f"--max-length={BF16_LENGTH}"
    return launch("target", *flags, env=collector.environment)


@pytest.fixture(scope="module")
def draft(launch, collector):
    """Such a draft."""
    flags = f"--model={DEMO / 'draft'}", "--slots=2", f"--max-length={BF16_LENGTH}"
    return launch("draft", *flags, env=collector.environment)


def line(service, request_id, method):
    """The one line that a service has logged of a call, as soon as it is there."""

    def found():
        return [
            entry
            for entry in service.entries()
            if entry["event"] == "call" and entry["request_id"] == request_id and entry["method"].endswith(method)
        ]

    wait_for(found, SOON, f"a line of {service.role} for {request_id}")
    (only,) = found()
    return only


def test_one_id_in_all_logs(target, draft, caplog):
    """The caller's id is in the result and in one line of each process, whose counts are those of the result."""

    async def work():
        async with SpeculativeClient(target.address, draft.address, **STEADY) as client:
            return await client.generate(PROMPT, PARAMS, request_id="order-66/a")

    with caplog.at_level(logging.INFO, "specpair.generation"):
        result = run(work())
    assert result.request_id == "order-66/a"
    judged, proposed = line(target, "order-66/a", "/Verify"), line(draft, "order-66/a", "/Propose")
    stats = result.stats
    assert {name: judged[name] for name in ("rounds", "proposed", "accepted", "output_tokens", "prompt_tokens")} == {
        "rounds": stats.rounds,
        "proposed": stats.proposed,
        "accepted": stats.accepted,
        "output_tokens": stats.output_tokens,
        "prompt_tokens": stats.prompt_tokens,
    }
    assert (judged["status"], judged["finish"], judged["turns"]) == ("OK", "max_new_tokens", 1)
    assert judged["stale"] >= stats.stale
    assert 0 <= judged["queue_seconds"] <= judged["seconds"]
    assert 0 < judged["prefill_seconds"] <= judged["seconds"]
    assert (proposed["status"], proposed["session_id"]) == ("OK", judged["session_id"])
    assert proposed["rounds"] > 0
    assert proposed["proposed"] >= stats.proposed
    (record,) = caplog.records
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs/logging.md").read_text()))
    usual = {*vars(logging.makeLogRecord({})), "message", "asctime"}
    assert {*judged, *proposed, *(set(vars(record)) - usual)} <= documented
    assert (record.request_id, record.status, record.finish) == ("order-66/a", "OK", "max_new_tokens")
    assert (record.rounds, record.accepted) == (stats.rounds, stats.accepted)


def test_turns_share_the_id_of_their_session(target, draft):
    """A session of several turns is one line under one id, with the counts of all turns."""

    async def work():
        async with SpeculativeClient(target.address, draft.address, **STEADY) as client:
            async with client.session() as session:
                turns = [await session.generate(text, PARAMS) for text in (PROMPT, "\n\nprint(")]
            return session.request_id, turns

    request_id, turns = run(work())
    assert {turn.request_id for turn in turns} == {request_id}
    judged = line(target, request_id, "/Verify")
    assert (judged["turns"], judged["output_tokens"]) == (2, sum(turn.stats.output_tokens for turn in turns))
    assert judged["cached_tokens"] == turns[1].stats.cached_tokens
    assert line(draft, request_id, "/Propose")["turns"] == 2


def test_a_refusal_says_its_id_and_its_field(target):
    """A request that cannot be used fails with the id under which the target has it, and its line says why."""

    async def work():
        async with SpeculativeClient(target.address, "ngram") as client:
            with pytest.raises(InvalidRequestError) as refused:
                await client.generate([10**9], PARAMS, request_id="bad-1")
            return refused.value

    refused = run(work())
    assert (refused.request_id, refused.field) == ("bad-1", "start.prompt.token_ids.ids[0]")
    refusal = line(target, "bad-1", "/Verify")
    assert (refusal["status"], refusal["field"]) == ("INVALID_ARGUMENT", "start.prompt.token_ids.ids[]")


@pytest.mark.parametrize("hostile", ['x", "level": "critical', "two words", "y" * 129, "\\x1b[2J\\n"])
def test_a_hostile_id_is_in_no_log(target, hostile):
    """What is no id is replaced by a fresh one, whether the client or another program sends it."""

    async def given():
        async with SpeculativeClient(target.address, "none") as client:
            return (await client.generate(PROMPT, PARAMS, request_id=hostile)).request_id

    async def sent():
        async with grpc.aio.insecure_channel(target.address) as channel:
            request = target_pb2.TokenizeRequest(prompt=common_pb2.Prompt(text="x"))
            call = target_pb2_grpc.TargetServiceStub(channel).Tokenize(request, metadata=(("x-request-id", hostile),))
            await call
            return dict(await call.trailing_metadata())["x-request-id"]

    for request_id, method in ((run(given()), "/Generate"), (run(sent()), "/Tokenize")):
        assert len(request_id) == 32
        assert line(target, request_id, method)["status"] == "OK"
    assert hostile not in target.text


def spans_of(collector, exporter, names):
    """All spans of the one trace that the client began, as (process, name, id, parent), when those names are there."""
    own = exporter.get_finished_spans()
    (trace_id,) = {span.context.trace_id for span in own}
    trace = f"{trace_id:032x}"
    wait_for(lambda: names <= {(who, span.name) for who, span in collector.of(trace)}, SOON, f"spans {names}")
    ours = [("client", span.name, span.context.span_id, span.parent and span.parent.span_id) for span in own]
    theirs = [
        (who, span.name, int.from_bytes(span.span_id), int.from_bytes(span.parent_span_id) or None)
        for who, span in collector.of(trace)
    ]
    return trace, ours + theirs


def test_one_trace_over_three_processes(target, draft, collector, exporter, provider):
    """The generation is the root, its two calls are below it, below those what the services did, and no text in any."""

    async def work():
        addresses = target.address, draft.address
        async with SpeculativeClient(*addresses, **STEADY, tracer_provider=provider) as client:
            return await client.generate(PROMPT, PARAMS)

    result = run(work())
    verify, propose = "specpair.v1.TargetService/Verify", "specpair.v1.DraftService/Propose"
    wanted = {("specpair-target", verify), ("specpair-draft", propose), ("specpair-target", "prefill")}
    trace, spans = spans_of(collector, exporter, wanted)

    def path(who, name):
        (found,) = [span for span in spans if span[:2] == (who, name)]
        steps = [found]
        while steps[-1][3] is not None:
            steps += [span for span in spans if span[2] == steps[-1][3]]
        return [step[:2] for step in steps]

    root = ("client", "specpair.generate")
    assert path("specpair-target", "prefill") == [
        ("specpair-target", "prefill"),
        ("specpair-target", verify),
        ("client", verify),
        root,
    ]
    assert path("specpair-draft", propose) == [("specpair-draft", propose), ("client", propose), root]
    assert line(target, result.request_id, "/Verify")["trace_id"] == trace
    generation = next(span for span in exporter.get_finished_spans() if span.name == "specpair.generate")
    assert generation.attributes["specpair.request_id"] == result.request_id
    assert generation.attributes["specpair.accepted"] == result.stats.accepted
    rounds = [event for event in generation.events if event.name == "round"]
    assert sum(event.attributes["accepted"] for event in rounds) == result.stats.accepted
    assert all(earlier.timestamp <= later.timestamp for earlier, later in pairwise(rounds))
    everything = str([span.to_json() for span in exporter.get_finished_spans()]) + str(collector.of(trace))
    assert "secret_values" not in everything
    assert result.text not in everything


def test_a_resumed_generation_keeps_its_id_and_its_trace(target, draft, collector, exporter, provider):
    """A target that is killed and comes back has the rest under the same id; the trace has both of the calls."""

    async def work():
        addresses = target.address, draft.address
        async with SpeculativeClient(*addresses, **STEADY, resume_timeout=PATIENCE, tracer_provider=provider) as client:
            expected = await client.generate(PROMPT, PARAMS)
            exporter.clear()
            async with client.stream(PROMPT, PARAMS, request_id="resumed-1") as stream:
                async for chunk in stream:
                    if len(stream.tokens) >= 12 and target.alive and not killed and chunk.finish_reason is None:
                        killed.append(len(stream.tokens))
                        await asyncio.to_thread(target.kill)
                        await asyncio.to_thread(target.restart)
            return expected, stream.result

    killed: list[int] = []
    expected, result = run(work(), within=PATIENCE)
    assert result.token_ids == expected.token_ids
    assert (result.stats.resumes, result.request_id) == (1, "resumed-1")
    assert target.address
    rest = line(target, "resumed-1", "/Verify")
    assert rest["committed_tokens"] + rest["output_tokens"] == PARAMS.max_new_tokens
    assert rest["committed_tokens"] >= killed[0]
    assert line(draft, "resumed-1", "/Propose")["status"] == "OK"
    verify = "specpair.v1.TargetService/Verify"
    _, spans = spans_of(collector, exporter, {("specpair-target", verify)})
    assert [name for who, name, *_ in spans if who == "client"].count(verify) == 2
    events = [event.name for span in exporter.get_finished_spans() for event in span.events if event.name != "round"]
    assert events == ["target lost", "resumed"]
