"""What the target counts of verification: one table, and what follows from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from specpair.v1.common_pb2 import FinishReason, Source
from specpair_target.blocks import Stale, Verification
from specpair_target.metrics import StreamMetrics, VerifyMetrics
from specpair_target.sessions import Commit
from specpair_target.verifier import Judgement

WIDTH = 8
NUM = "specpair_spec_decode_num"


def verification(accepted, *, ended=False, queue_us=1000, forward_us=5000, judge_us=2000):
    """The answer to a block of which so many proposals were accepted."""
    tokens = list(range(accepted + 1))
    finish = FinishReason.FINISH_REASON_STOP_TOKEN if ended else FinishReason.FINISH_REASON_UNSPECIFIED
    commit = Commit(tokens, [""] * len(tokens), [], finish, "")
    return Verification(Judgement(accepted, tokens, True, forward_us, judge_us, []), commit, 9, queue_us, 1)


@pytest.fixture
def registry():
    return CollectorRegistry()


blocks = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(0, WIDTH - 1)).flatmap(
        lambda block: st.tuples(st.just(block[0]), st.just(block[1]), st.integers(0, block[1]))
    ),
    max_size=60,
)


@given(blocks)
def test_acceptance_is_what_counting_block_by_block_gives(rounds):
    """Sums by source, by place and by length are those of a plain count over all blocks."""
    registry = CollectorRegistry()
    stream = StreamMetrics(VerifyMetrics(registry))
    for source, proposed, accepted in rounds:
        stream.submitted(1)
        stream.answered(source, proposed, accepted, verification(accepted))

    def value(name, **labels):
        return registry.get_sample_value(name, labels) or 0

    for source in (Source.SOURCE_TARGET, Source.SOURCE_MODEL, Source.SOURCE_NGRAM, Source.SOURCE_PREDICTION):
        label = Source.Name(source).removeprefix("SOURCE_").lower()
        own = [(proposed, accepted) for of, proposed, accepted in rounds if of == source]
        assert value("specpair_rounds_total", source=label) == len(own)
        assert value(f"{NUM}_drafts_total", source=label) == sum(proposed > 0 for proposed, _ in own)
        assert value(f"{NUM}_draft_tokens_total", source=label) == sum(proposed for proposed, _ in own)
        assert value(f"{NUM}_accepted_tokens_total", source=label) == sum(accepted for _, accepted in own)
    for place in range(WIDTH):
        reached = sum(place < proposed and place <= accepted for _, proposed, accepted in rounds)
        assert value(f"{NUM}_reached_tokens_per_pos_total", position=str(place)) == reached
        kept = sum(place < accepted for *_, accepted in rounds)
        assert value(f"{NUM}_accepted_tokens_per_pos_total", position=str(place)) == kept
        shorter = sum(proposed <= place for _, proposed, _ in rounds)
        assert value("specpair_draft_length_bucket", le=str(float(place))) == shorter
        less = sum(accepted <= place for _, proposed, accepted in rounds if proposed)
        assert value("specpair_acceptance_length_bucket", le=str(float(place))) == less
    assert value("specpair_draft_length_bucket", le="+Inf") == value("specpair_draft_length_count") == len(rounds)
    assert value("specpair_draft_length_sum") == sum(proposed for _, proposed, _ in rounds)
    output = sum(accepted + 1 for *_, accepted in rounds)
    assert value("specpair_output_tokens_total", method="Verify") == output


def test_stages(registry):
    """A block's times are those of its answer: the forward pass without the judgement behind it."""
    stream = StreamMetrics(VerifyMetrics(registry))
    stream.submitted(1)
    stream.answered(Source.SOURCE_MODEL, 3, 2, verification(2))
    sums = {
        stage: registry.get_sample_value("specpair_round_seconds_sum", {"stage": stage})
        for stage in ("queue", "forward", "judge", "away")
    }
    assert sums == {"queue": 0.001, "forward": 0.003, "judge": 0.002, "away": 0}


def test_away_is_between_the_last_verdict_and_the_next_block(registry):
    """It is counted where the target waits for the session: not behind blocks sent ahead, nor between two turns."""

    def away():
        return registry.get_sample_value("specpair_round_seconds_count", {"stage": "away"})

    stream = StreamMetrics(VerifyMetrics(registry))
    stream.submitted(2)
    stream.answered(Source.SOURCE_MODEL, 3, 2, verification(2))
    stream.submitted(1)
    assert away() == 0  # one was still under way
    stream.answered(Source.SOURCE_MODEL, 3, 2, verification(2))
    stream.answered(Source.SOURCE_MODEL, 3, 2, verification(2))
    stream.submitted(1)
    assert away() == 1
    stream.answered(Source.SOURCE_MODEL, 3, 2, verification(2, ended=True))
    stream.submitted(1)
    assert away() == 1  # the caller's time between two turns is nobody's round


def test_stale_blocks_are_no_rounds(registry):
    """A block that was dropped is counted as such and nowhere else."""
    stream = StreamMetrics(VerifyMetrics(registry))
    stream.submitted(1)
    stream.answered(Source.SOURCE_MODEL, 3, 0, Stale(12))
    assert registry.get_sample_value("specpair_stale_blocks_total") == 1
    assert registry.get_sample_value("specpair_rounds_total", {"source": "model"}) is None
    assert registry.get_sample_value("specpair_round_seconds_count", {"stage": "queue"}) == 0


@pytest.mark.parametrize("number", [0, 5, 12345, -1])
def test_sources_that_the_protocol_does_not_have(registry, number):
    """They are counted as one: a client can send any number."""
    stream = StreamMetrics(VerifyMetrics(registry))
    stream.submitted(1)
    stream.answered(number, 1, 1, verification(1))
    assert registry.get_sample_value("specpair_rounds_total", {"source": "other"}) == 1


def test_turns(registry):
    """Prompts and what is known of them are added up; a turn that goes on behind an earlier stream is a resumed one."""
    metrics = VerifyMetrics(registry)
    metrics.began(prompt_tokens=10)
    metrics.began(prompt_tokens=30, cached_tokens=20)
    metrics.began(prompt_tokens=5, committed_tokens=7)
    for name, expected in (
        ("turns", 3),
        ("resumed_turns", 1),
        ("prompt_tokens", 45),
        ("cached_prompt_tokens", 20),
    ):
        assert registry.get_sample_value(f"specpair_{name}_total") == expected


def test_a_scrape_while_counting(registry):
    """A table that grows meanwhile is read as it was: what one scrape says of it belongs together."""
    metrics = VerifyMetrics(registry)
    stream = StreamMetrics(metrics)
    stream.answered(Source.SOURCE_MODEL, 1, 1, verification(1))
    scraped = {}
    for family in registry.collect():
        scraped |= {sample.name: sample.value for sample in family.samples}
        stream.answered(Source.SOURCE_MODEL, 7, 3, verification(3))
    rounds = scraped["specpair_rounds_total"]
    assert rounds < sum(metrics.blocks.values())
    assert rounds == scraped[f"{NUM}_drafts_total"] == scraped["specpair_draft_length_count"]
    assert rounds == scraped["specpair_acceptance_length_count"]
