"""What every engine counts: its slots as they are, its thread's work, and compilations."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from specpair.errors import OverloadedError
from specpair_runtime.engine_metrics import EngineMetrics
from specpair_runtime.serving import Caller
from specpair_runtime.slots import SlotPool


@pytest.fixture
def registry():
    return CollectorRegistry()


def value(registry, name, **labels):
    """One sample; None if it is not there."""
    return registry.get_sample_value(f"specpair_{name}", labels)


def test_slots_and_queue_are_the_moments(registry):
    """Slots in use and sessions that wait are read when somebody looks; waits are those of sessions that got a slot."""

    async def check():
        metrics = EngineMetrics(registry)
        pool = SlotPool(2, 5, 0.05, waited=metrics.waited)
        metrics.watch(pool, queue=5, recompilations=int)
        assert value(registry, "slots") == 2
        assert value(registry, "queue_capacity") == 5
        first = await pool.acquire(Caller("a"))
        await pool.acquire(Caller("a"))
        late = asyncio.create_task(pool.acquire(Caller("b")))
        lucky = asyncio.create_task(pool.acquire(Caller("c")))
        await asyncio.sleep(0)
        assert (value(registry, "slots_in_use"), value(registry, "queue_length")) == (2, 2)
        pool.release(first)
        await late
        with pytest.raises(OverloadedError):
            await lucky
        assert (value(registry, "slots_in_use"), value(registry, "queue_length")) == (2, 0)
        assert value(registry, "slot_wait_seconds_count") == 3

    asyncio.run(check())


def test_slots_are_not_there_before_the_model(registry):
    """Nobody reads room that does not exist yet."""
    EngineMetrics(registry)
    assert value(registry, "slots") is None
    assert value(registry, "recompilations_total") is None


def test_work(registry):
    """Chunks and steps are timed apart; steps by how many sessions shared them, chunks by their tokens."""
    metrics = EngineMetrics(registry)
    metrics.prefilled(128, 0.5)
    metrics.stepped(1, 0.1)
    metrics.stepped(3, 0.2)
    assert value(registry, "engine_seconds_sum", work="prefill") == 0.5
    assert value(registry, "engine_seconds_sum", work="step") == pytest.approx(0.3)
    assert value(registry, "engine_seconds_count", work="step") == 2
    assert value(registry, "engine_sessions_sum") == 4
    assert value(registry, "engine_sessions_bucket", le="1.0") == 1
    assert value(registry, "prefill_tokens_total") == 128


def test_compilations_are_counted_elsewhere(registry):
    """The counter is whatever the model's own says now."""
    count = 0
    EngineMetrics(registry).watch(SlotPool(1, 0, 0.0), queue=0, recompilations=lambda: count)
    assert value(registry, "recompilations_total") == 0
    count = 3
    assert value(registry, "recompilations_total") == 3


def test_without_a_registry():
    """Everything is counted all the same, and nothing is registered anywhere."""
    metrics = EngineMetrics()
    metrics.watch(SlotPool(1, 0, 0.0), queue=0, recompilations=int)
    metrics.stepped(1, 0.1)
    metrics.waited(0.0)
