"""Laws of a draft service that is replaced while nobody looks: by the same model it is used, by another one never."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specpair import SamplingParams, Source, SpeculativeClient
from specpair.errors import InvalidRequestError

from .. import virtual_time
from .fakes import FINGERPRINT, VOCABULARY, FakeTarget, continuation
from .flaky import FlakyDraft

PROMPT = (3, 4, 5)
PARAMS = SamplingParams(max_new_tokens=60)
CHANGES = {
    "vocabulary_size": VOCABULARY + 1,
    "vocabulary_sha256": "cc",
    "special_tokens_sha256": "cc",
    "eos_token_ids": (1, 2),
}


def generations(between, count=3, mode="draft:1"):
    """Results before and after something happens to a draft that nobody uses at the time; and the draft."""
    draft = FlakyDraft()

    async def work():
        options = {"target_transport": FakeTarget(delay=0.01), "draft_transport": draft, "lookup": False}
        async with SpeculativeClient("target:1", mode, **options) as client:
            before = await client.generate(PROMPT, PARAMS)
            between(draft)
            return [before, *[await client.generate(PROMPT, PARAMS) for _ in range(count)]]

    results = virtual_time.run(work())
    for result in results:
        assert list(result.token_ids) == continuation(PROMPT, PARAMS.max_new_tokens)
    assert results[0].stats.proposer == "model"
    return results[1:], draft


@pytest.mark.parametrize("mode", ["draft:1", "auto:draft:1"])
@pytest.mark.parametrize("field", CHANGES)
def test_another_vocabulary(field, mode):
    """Who starts a turn says what its ids mean: nothing is taken from another vocabulary, and it is tried once."""

    def swap(draft):
        draft.life += 1
        draft.fingerprint = replace(FINGERPRINT, **{field: CHANGES[field]})

    results, draft = generations(swap, mode=mode)
    for result in results:
        assert result.stats.proposer == "ngram"
        assert Source.MODEL not in result.stats.accepted_by_source
        assert f"draft.fingerprint.{field}" in result.stats.proposer_changes[-1].reason
    first, second = draft.streams
    assert first.finished
    assert second.cancelled
    assert not second.used


def test_the_same_model_again():
    """A restarted service is used from the first round on."""

    def restart(draft):
        draft.life += 1

    results, _ = generations(restart)
    for result in results:
        assert result.stats.proposer == "model"
        assert not result.stats.proposer_changes


def test_a_service_that_does_not_say():
    """One that tells no fingerprint at the start, as earlier versions do not, is used."""

    def forget(draft):
        draft.fingerprint = None

    results, _ = generations(forget)
    assert {result.stats.proposer for result in results} == {"model"}


@pytest.mark.parametrize(
    ("field", "told"),
    [("start.token_ids[1]", "start.token_ids[1]"), ("start.sampling.logit_bias[77]", "start.sampling.logit_bias")],
)
def test_an_id_that_another_vocabulary_does_not_have(field, told, caplog):
    """A draft that knows fewer ids than the target is compared anew, and asked nothing more. No id is logged."""

    class Smaller(FlakyDraft):
        small = False

        async def propose(self, start, within=None):
            stream = await super().propose(start, within)
            if self.small:
                stream.refused = InvalidRequestError("is outside the vocabulary of 3", field=field)
            return stream

    draft = Smaller()

    async def work():
        options = {"target_transport": FakeTarget(delay=0.01), "draft_transport": draft, "lookup": False}
        async with SpeculativeClient("target:1", "draft:1", **options) as client:
            await client.generate(PROMPT, PARAMS)
            draft.small, draft.fingerprint = True, replace(FINGERPRINT, vocabulary_size=3)
            return [await client.generate(PROMPT, PARAMS) for _ in range(4)]

    results = virtual_time.run(work())
    assert {result.stats.proposer for result in results} == {"ngram"}
    reason = f"draft lost: {told}: is outside the vocabulary of 3"
    assert results[0].stats.proposer_changes[0].reason == reason
    assert reason in caplog.text
    assert "77" not in caplog.text
    assert "draft.fingerprint.vocabulary_size" in results[-1].stats.proposer_changes[0].reason
    assert len(draft.streams) == 2
