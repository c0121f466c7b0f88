"""What a client counts for Prometheus: every generation once, at its end."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from specpair import InvalidRequestError, SamplingParams, SpeculativeClient
from specpair.metrics import ClientMetrics
from specpair.results import ProposerChange, Source, Stats

from .. import virtual_time
from .fakes import FakeTarget

PARAMS = SamplingParams(max_new_tokens=12)


@pytest.fixture
def registry():
    return CollectorRegistry()


def value(registry, name, **labels):
    """One sample of a client's; 0 if it is not there."""
    return registry.get_sample_value(f"specpair_client_{name}", labels) or 0


def client_of(metrics, target=None, draft="ngram"):
    """A client of an in-memory target that counts."""
    return SpeculativeClient(
        "target:1", draft, target_transport=target or FakeTarget(), resume_timeout=0.0, metrics=metrics
    )


def test_everything_that_statistics_have(registry):
    """Counts, lengths, places and times of two generations are added up."""
    stats = Stats(
        rounds=4,
        rounds_by_source={Source.MODEL: 3, Source.TARGET: 1},
        proposed=9,
        proposed_by_source={Source.MODEL: 9},
        accepted=5,
        accepted_by_source={Source.MODEL: 5},
        draft_lengths={0: 1, 3: 3},
        reached_by_position=(3, 3, 2),
        accepted_by_position=(3, 2, 0),
        stale=1,
        dropped=2,
        resumes=1,
        output_tokens=9,
        seconds=3.0,
        time_to_first_token=1.0,
        proposing_seconds=0.5,
        verifying_seconds=0.8,
        judging_seconds=0.2,
        queued_seconds=0.1,
        wire_seconds=0.3,
        proposer_changes=(ProposerChange(2, "ngram", "lost"), ProposerChange(3, "model", "back")),
    )
    metrics = ClientMetrics(registry)
    for _ in range(2):
        metrics.record("OK", "max_new_tokens", stats)

    assert value(registry, "generations_total", status="OK", finish="max_new_tokens") == 2
    assert value(registry, "output_tokens_total", source="model") == 10
    assert value(registry, "output_tokens_total", source="target") == 8
    assert value(registry, "rounds_total", source="model") == 6
    assert value(registry, "draft_tokens_total", source="model") == 18
    assert value(registry, "accepted_tokens_total", source="model") == 10
    assert [value(registry, "reached_tokens_per_pos_total", position=str(place)) for place in range(3)] == [6, 6, 4]
    assert [value(registry, "accepted_tokens_per_pos_total", position=str(place)) for place in range(3)] == [6, 4, 0]
    assert value(registry, "draft_length_sum") == 18
    assert value(registry, "draft_length_bucket", le="2.0") == 2
    for stage, seconds in {"propose": 0.5, "queue": 0.1, "forward": 0.6, "judge": 0.2, "wire": 0.3}.items():
        assert value(registry, "stage_seconds_total", stage=stage) == pytest.approx(2 * seconds)
    # Nine tokens at 0.2 s a step, against two seconds behind the first round and that round's own step.
    assert value(registry, "plain_seconds_total") == pytest.approx(2 * 9 * 0.2)
    assert value(registry, "decode_seconds_total") == pytest.approx(2 * 2.2)
    for name in ("resumes", "draft_losses", "draft_returns", "stale_blocks"):
        assert value(registry, f"{name}_total") == 2
    assert value(registry, "dropped_blocks_total") == 4
    assert value(registry, "generation_seconds_count") == value(registry, "first_token_seconds_count") == 2


@pytest.mark.parametrize("draft", ["ngram", "none"])
def test_a_generation_is_counted_once(registry, draft):
    """However it is asked for: whole, as a stream, as a turn of a session; with its finish reason."""

    async def check():
        async with client_of(ClientMetrics(registry), draft=draft) as client:
            whole = await client.generate((1, 2, 3), PARAMS)
            async for _ in client.stream((1, 2, 3), PARAMS):
                pass
            if draft != "none":
                async with client.session() as session:
                    await session.generate((1, 2, 3), PARAMS)
            return whole

    result = virtual_time.run(check())
    times = 2 if draft == "none" else 3
    assert value(registry, "generations_total", status="OK", finish="max_new_tokens") == times
    tokens = sum(value(registry, "output_tokens_total", source=source.value) for source in Source)
    assert tokens == times * len(result.tokens)


def test_who_fails_to_count_costs_no_result(caplog):
    """An observer that raises is told in the log; the generation is what it is without one."""

    class Broken:
        def record(self, status, finish, stats):
            raise ValueError("no more room")

    async def check(metrics):
        async with client_of(metrics) as client:
            return await client.generate((1, 2, 3), PARAMS)

    assert virtual_time.run(check(Broken())).token_ids == virtual_time.run(check(None)).token_ids
    assert [record.message for record in caplog.records] == ["a generation was not counted"]


def test_a_generation_that_is_left(registry):
    """Is counted as cancelled, with the tokens that it had."""

    async def check():
        async with client_of(ClientMetrics(registry)) as client:
            async with client.stream((1, 2, 3), PARAMS) as stream:
                await anext(stream)
            return len(stream.tokens)

    tokens = virtual_time.run(check())
    assert value(registry, "generations_total", status="CANCELLED", finish="") == 1
    assert sum(value(registry, "output_tokens_total", source=source.value) for source in Source) == tokens > 0


def test_a_generation_that_fails(registry):
    """Is counted by the status of its error."""

    async def check():
        async with client_of(ClientMetrics(registry)) as client:
            with pytest.raises(InvalidRequestError):
                await client.generate((), PARAMS)

    virtual_time.run(check())
    [family] = [family for family in registry.collect() if family.name == "specpair_client_generations"]
    failed = {sample.labels["status"] for sample in family.samples if sample.labels["finish"] == "" and sample.value}
    assert failed == {"INVALID_ARGUMENT"}


def test_clients_share_metrics(registry):
    """Two clients with one object are added up; two objects in one registry are refused."""
    metrics = ClientMetrics(registry)

    async def check():
        async with client_of(metrics) as one, client_of(metrics) as two:
            await asyncio.gather(one.generate((1, 2, 3), PARAMS), two.generate((1, 2, 3), PARAMS))

    virtual_time.run(check())
    assert value(registry, "generations_total", status="OK", finish="max_new_tokens") == 2
    with pytest.raises(ValueError, match="Duplicated"):
        ClientMetrics(registry)
