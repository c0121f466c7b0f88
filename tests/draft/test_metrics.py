"""What the draft counts: proposals by source, their lengths, and what they took."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from specpair.v1.common_pb2 import Source
from specpair_draft.metrics import DraftMetrics


@pytest.fixture
def registry():
    return CollectorRegistry()


def value(registry, name, **labels):
    """One sample of drafting."""
    return registry.get_sample_value(f"specpair_draft_{name}", labels)


def test_proposals(registry):
    """Each is counted under who made it, with its tokens, its length and its two stages."""
    metrics = DraftMetrics(registry)
    metrics.proposed(Source.SOURCE_MODEL, 5, 1_000, 4_000)
    metrics.proposed(Source.SOURCE_MODEL, 3, 2_000, 1_000)
    metrics.proposed(Source.SOURCE_NGRAM, 7, 100, 20)
    assert value(registry, "proposals_total", source="model") == 2
    assert value(registry, "proposed_tokens_total", source="model") == 8
    assert value(registry, "proposed_tokens_total", source="ngram") == 7
    assert value(registry, "proposal_length_sum") == 15
    assert value(registry, "seconds_sum", stage="queue") == pytest.approx(0.0031)
    assert value(registry, "seconds_sum", stage="draft") == pytest.approx(0.00502)


def test_what_was_ready(registry):
    """A proposal of the model that took no step since the ask was guessed ahead; an empty one, or a lookup, was not."""
    metrics = DraftMetrics(registry)
    metrics.proposed(Source.SOURCE_MODEL, 5, 10, 0)
    metrics.proposed(Source.SOURCE_MODEL, 5, 10, 900)
    metrics.proposed(Source.SOURCE_MODEL, 0, 10, 0)
    metrics.proposed(Source.SOURCE_NGRAM, 5, 10, 0)
    assert value(registry, "ready_proposals_total") == 1
