"""What the services count is what the client saw."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import grpc
import pytest

from specpair import OverloadedError, SamplingParams, SpeculativeClient, UnavailableError
from specpair.v1 import target_pb2, target_pb2_grpc

from ..deploy.exported import exported, registries
from .metrics import Scrape, address
from .processes import DEMO, UNHURRIED, run, wait_for
from .sessions import ids_prompt

TOKENS = 48
PROPOSED = "specpair_spec_decode_num_draft_tokens_total"
ACCEPTED = "specpair_spec_decode_num_accepted_tokens_total"
PER_POSITION = "specpair_spec_decode_num_{}_tokens_per_pos_total"


@pytest.fixture(scope="module")
def target(launch):
    """A target of its own with two slots, so that nobody else is counted."""
    return launch("target", f"--model={DEMO / 'target'}", "--slots=2", "--queue=0", "--metrics-listen=127.0.0.1:0")


@pytest.fixture(scope="module")
def draft(launch):
    """A draft of its own."""
    return launch("draft", f"--model={DEMO / 'draft'}", "--dtype=fp32", "--metrics-listen=127.0.0.1:0")


def scrape(service, name, value, **labels):
    """The metrics of a service as soon as one has a value: calls end a moment after the client has what it wants."""
    last = None

    def there():
        nonlocal last
        last = Scrape.of(service)
        return last.value(name, **labels) == value

    wait_for(there, 10, f"{name}{labels} {value}")
    return last


def generate(target, draft, texts, **options):
    """Statistics of generations of one client, side by side."""
    params = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)

    async def work():
        async with SpeculativeClient(target.address, draft, **options) as client:
            results = await asyncio.gather(*(client.generate(text, params) for text in texts))
            return [result.stats for result in results]

    return run(work())


def summed(counts):
    """Several mappings added up, what is 0 left out."""
    total = Counter()
    for count in counts:
        total.update(count)
    return {key: value for key, value in total.items() if value}


def test_both_services_count_what_the_client_saw(target, draft, heldout):
    """Rounds, proposals and acceptance, by source, by position and by length, are the client's own figures."""
    stats = generate(target, draft.address, [text[:300] for text in heldout[:2]])
    stats += generate(target, "ngram", [heldout[2][:300]])
    scraped = scrape(target, "specpair_requests_total", 3, method="TargetService/Verify", code="OK")

    assert scraped.by("source", "specpair_rounds_total") == summed(one.rounds_by_source for one in stats)
    assert scraped.by("source", PROPOSED) == summed(one.proposed_by_source for one in stats)
    assert scraped.by("source", ACCEPTED) == summed(one.accepted_by_source for one in stats)
    assert scraped.value(ACCEPTED) == sum(one.accepted for one in stats) > 0
    for name, of in (("reached", "reached_by_position"), ("accepted", "accepted_by_position")):
        seen = summed({str(place): count for place, count in enumerate(getattr(one, of))} for one in stats)
        assert scraped.by("position", PER_POSITION.format(name)) == seen

    lengths = summed(one.draft_lengths for one in stats)
    for bound in range(9):
        expected = sum(times for length, times in lengths.items() if length <= bound)
        assert scraped.value("specpair_draft_length_bucket", le=str(float(bound))) == expected
    assert scraped.value("specpair_draft_length_sum") == sum(one.proposed for one in stats)
    assert scraped.value("specpair_acceptance_length_sum") == sum(one.accepted for one in stats)
    assert scraped.value("specpair_output_tokens_total", method="Verify") == 3 * TOKENS
    assert scraped.value("specpair_prompt_tokens_total") == sum(one.prompt_tokens for one in stats)
    assert scraped.value("specpair_turns_total") == 3
    assert scraped.value("specpair_round_seconds_count", stage="forward") == sum(one.rounds for one in stats)
    for stage, seconds in (
        ("queue", sum(one.queued_seconds for one in stats)),
        ("forward", sum(one.verifying_seconds - one.judging_seconds for one in stats)),
        ("judge", sum(one.judging_seconds for one in stats)),
    ):
        assert scraped.value("specpair_round_seconds_sum", stage=stage) == pytest.approx(seconds)

    proposals = Scrape.of(draft)
    by_model = sum(one.proposed_by_source.get("model", 0) for one in stats)
    assert proposals.value("specpair_draft_proposed_tokens_total", source="model") >= by_model > 0
    assert proposals.value("specpair_draft_seconds_count", stage="draft") == proposals.value(
        "specpair_draft_proposals_total"
    )


def test_what_is_read_when_somebody_looks(target, draft):
    """Slots in use, the phase and recompilations are those of the moment; the process is described."""

    async def check():
        client = SpeculativeClient(target.address, draft.address, draft_timeout=UNHURRIED)
        async with client, client.session() as session:
            await session.generate("x = 1\n", SamplingParams(max_new_tokens=4))
            return Scrape.of(target), Scrape.of(draft)

    for scraped, slots in zip(run(check()), (2, 4), strict=True):
        assert scraped.value("specpair_slots") == slots
        assert scraped.value("specpair_slots_in_use") == 1
        assert scraped.value("specpair_queue_length") == 0
        assert scraped.value("specpair_requests_running") == 1
        assert scraped.value("specpair_recompilations_total") == 0
        assert scraped.by("phase", "specpair_phase") == {"ready": 1}
        assert scraped.value("process_resident_memory_bytes") > 0
    for service in (target, draft):
        scrape(service, "specpair_slots_in_use", 0)


def test_refusals_have_a_reason(target):
    """A session that gets no slot is counted by its reason; the plain loop's tokens are counted apart."""
    before = Scrape.of(target).value("specpair_output_tokens_total", method="Generate")

    generate(target, "none", ["def f"])
    scrape(target, "specpair_slots_in_use", 0)

    async def check():
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                client = await stack.enter_async_context(SpeculativeClient(target.address, "ngram"))
                session = await stack.enter_async_context(client.session())
                await session.generate("def f", SamplingParams(max_new_tokens=1))  # its slot is kept until it ends
            client = await stack.enter_async_context(SpeculativeClient(target.address, "none", resume_timeout=0))
            with pytest.raises((OverloadedError, UnavailableError)):
                await client.generate("x", SamplingParams(max_new_tokens=1))

    run(check())
    scraped = scrape(target, "specpair_slots_in_use", 0)
    assert scraped.value("specpair_refusals_total", reason="QUEUE_FULL") >= 1
    assert scraped.value("specpair_requests_total", code="RESOURCE_EXHAUSTED") >= 1
    assert scraped.value("specpair_output_tokens_total", method="Generate") == before + TOKENS


def test_names(target, draft):
    """A process serves the metrics that `registries` have, which are the documented ones, and says what it is."""
    known = registries()
    for service in (target, draft):
        scraped = Scrape.of(service)
        assert scraped.names == set(exported(known[service.role]))
        [info] = [sample.labels for sample in scraped.samples if sample.name == "specpair_info"]
        assert set(info) == {"service", "version", "model", "dtype", "quantization"}
        assert info["service"] == service.role


def test_labels_are_bounded(target):
    """Nothing that a caller makes up becomes a label: no method's name, no request id, no number of a source."""
    evil = "evil-7f3a"

    async def check():
        async with grpc.aio.insecure_channel(target.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(f"/{evil}/{evil}")(b"", metadata=(("x-request-id", evil),))
            call = target_pb2_grpc.TargetServiceStub(channel).Verify(metadata=(("x-request-id", evil),))
            start = target_pb2.SessionStart(prompt=ids_prompt((5, 6, 7)))
            await call.write(target_pb2.VerifyRequest(start=start))
            await call.read()
            block = target_pb2.Block(round=1, base_length=3, token_ids=[9], source=12345)
            await call.write(target_pb2.VerifyRequest(block=block))
            await call.read()
            await call.done_writing()

    run(check())
    scraped = scrape(target, "specpair_rounds_total", 1, source="other")
    assert not [sample for sample in scraped.samples if evil in str(sample.labels) or "12345" in str(sample.labels)]


def test_no_listener_by_default(bf16_target):
    """Without --metrics-listen nothing is served."""
    assert bf16_target.address
    assert "serving metrics" not in bf16_target.text


def test_an_address_in_use(target, launch):
    """A service whose metrics have no address ends with status 1 before it loads, and says which setting it is."""
    taken = address(target)
    second = launch("draft", "--proposer=ngram", f"--metrics-listen={taken}")
    assert second.wait() == 1
    assert f"cannot listen on {taken}" in second.text
