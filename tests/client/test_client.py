"""Laws of a generation, from the caller's side, with in-memory services."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest

import specpair
from specpair import (
    DeadlineError,
    DraftMismatchError,
    FinishReason,
    InvalidRequestError,
    Phase,
    ProtocolError,
    SamplingParams,
    Source,
    SpeculativeClient,
    UnavailableError,
)

from .. import virtual_time
from . import fakes
from .fakes import FINGERPRINT, FakeDraft, FakeTarget, continuation

PROMPT = (3, 4, 5)
COUNT = 40
PARAMS = SamplingParams(max_new_tokens=COUNT)
BEHAVIOURS = [
    fakes.perfect,
    fakes.liar,
    fakes.wrong_round,
    fakes.wrong_base,
    fakes.starting_again,
    fakes.hanging,
    fakes.dying,
]
LOST = [fakes.wrong_round, fakes.wrong_base, fakes.starting_again, fakes.hanging, fakes.dying]


def client(target=None, draft=None, mode="draft:1", **options):
    options.setdefault("draft_timeout", 0.05)
    return SpeculativeClient(
        "target:1", mode, target_transport=target or FakeTarget(), draft_transport=draft or FakeDraft(), **options
    )


def generate(*args, prompt=PROMPT, params=PARAMS, timeout=None, **options):
    async def run():
        async with client(*args, **options) as opened:
            return await opened.generate(prompt, params, timeout=timeout)

    return virtual_time.run(run())


def name(value):
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=name)
@pytest.mark.parametrize("draft_length", [None, 0, 1, 3, 7, 50])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_output_does_not_depend_on_the_draft(behaviour, draft_length, seed):
    """Whatever a draft service does and however long its proposals are, the tokens and the text are the target's; the
    accepted tokens of each source add up."""
    params = SamplingParams(max_new_tokens=COUNT, seed=seed)
    result = generate(None, FakeDraft(behaviour), draft_length=draft_length, params=params)
    alone = generate(mode="none", params=params)
    assert list(result.token_ids) == list(alone.token_ids) == continuation(PROMPT, COUNT, seed)
    assert result.text == alone.text == "".join(token.text for token in result.tokens)
    assert result.finish_reason is alone.finish_reason is FinishReason.MAX_NEW_TOKENS
    stats = result.stats
    assert sum(stats.accepted_by_source.values()) == stats.accepted <= stats.proposed
    assert sum(stats.proposed_by_source.values()) == stats.proposed
    assert stats.output_tokens == COUNT == stats.accepted + sum(t.source is Source.TARGET for t in result.tokens)
    assert stats.prompt_tokens == len(result.prompt_token_ids) == len(PROMPT)


@pytest.mark.parametrize("draft_length", [None, 0, 2, 7])
def test_prompt_lookup_changes_the_speed_only(draft_length):
    """Proposals made in the client give the same tokens in fewer rounds."""
    result = generate(mode="ngram", draft_length=draft_length, params=SamplingParams(max_new_tokens=200))
    assert list(result.token_ids) == continuation(PROMPT, 200)
    assert set(result.stats.accepted_by_source) <= {Source.NGRAM}
    assert result.stats.proposer == "ngram"
    if draft_length != 0:
        assert result.stats.rounds < 150


def test_without_a_draft_the_target_decodes_alone():
    """`none` uses the target's own loop: nothing is proposed, every token is the target's."""
    target = FakeTarget()
    result = generate(target, mode="none")
    assert (target.blocks, target.infos) == ([], 1)
    assert {token.source for token in result.tokens} == {Source.TARGET}
    assert (result.stats.rounds, result.stats.proposed, result.stats.acceptance_rate) == (COUNT, 0, 0.0)


def test_a_perfect_draft_saves_rounds():
    """With everything accepted a round brings as many tokens as a block holds."""
    result = generate(draft_length=7)
    assert result.stats.rounds == COUNT // 8
    assert result.stats.acceptance_rate == 1.0
    assert result.stats.tokens_per_round == 8.0
    assert result.stats.proposer == "model"


@pytest.mark.parametrize("behaviour", LOST, ids=name)
def test_a_lost_draft_is_replaced_by_prompt_lookup(behaviour, caplog):
    """From the very round in which it is lost, once in the log, with the reason in the statistics."""
    draft = FakeDraft(behaviour)
    with caplog.at_level(logging.WARNING, "specpair"):
        stats = generate(None, draft, draft_length=4, chain=0).stats
    (change,) = stats.proposer_changes
    assert (change.round, change.proposer) == (3, "ngram")
    assert change.reason.startswith("draft lost: ")
    assert stats.proposer == "ngram"
    assert [change.reason in record.message for record in caplog.records] == [True]
    assert draft.streams[0].cancelled


@pytest.mark.parametrize(
    ("draft", "reason"),
    [
        (FakeDraft(unreachable=UnavailableError("connection refused")), "draft unreachable: connection refused"),
        (FakeDraft(phase=Phase.LOADING), "draft not ready: loading"),
        (FakeDraft(refuses=UnavailableError("full")), "draft lost: full"),
    ],
)
def test_a_draft_that_cannot_be_had_at_the_start_is_replaced(draft, reason):
    """The first round already has prompt lookup."""
    result = generate(None, draft)
    assert list(result.token_ids) == continuation(PROMPT, COUNT)
    assert [(change.round, change.reason) for change in result.stats.proposer_changes] == [(1, reason)]


def test_a_draft_is_used_again_once_it_is_back():
    """Within two seconds, while generations go on without it."""

    async def run():
        draft = FakeDraft(phase=Phase.LOADING)
        async with client(None, draft) as opened, asyncio.timeout(2.0):
            stats = (await opened.generate(PROMPT, PARAMS)).stats
            assert (stats.proposer, stats.draft_losses, stats.draft_returns) == ("ngram", 1, 0)
            draft.phase = Phase.READY
            while stats.proposer != "model" or stats.proposer_changes:
                await asyncio.sleep(0.01)
                stats = (await opened.generate(PROMPT, PARAMS)).stats

    virtual_time.run(run())


@pytest.mark.parametrize(
    "changes",
    [
        {"vocabulary_size": 51},
        {"vocabulary_sha256": "other"},
        {"special_tokens_sha256": "other"},
        {"eos_token_ids": (0, 1)},
    ],
)
def test_a_draft_with_another_vocabulary_is_refused(changes, caplog):
    """With an address that is an error that names the field; with `auto` prompt lookup takes over and says why."""
    (field,) = changes
    draft = FakeDraft(fingerprint=replace(FINGERPRINT, **changes))
    with pytest.raises(DraftMismatchError) as refused:
        generate(None, draft)
    assert refused.value.field == f"draft.fingerprint.{field}"
    with caplog.at_level(logging.WARNING, "specpair"):
        result = generate(None, draft, mode="auto:draft:1")
    assert list(result.token_ids) == continuation(PROMPT, COUNT)
    assert field in result.stats.proposer_changes[0].reason
    assert field in caplog.text
    assert draft.streams == []


def test_what_one_side_does_not_know_is_not_compared():
    """A draft without a tokenizer, or without a model, cannot contradict."""
    for fingerprint in (replace(FINGERPRINT, vocabulary_sha256="", special_tokens_sha256=""), None):
        assert generate(None, FakeDraft(fingerprint=fingerprint)).stats.proposer == "model"


def test_the_pair_is_compared_once():
    """The services are asked what they run with the first generation only."""
    target = FakeTarget()

    async def run():
        async with client(target) as opened:
            for _ in range(3):
                await opened.generate(PROMPT, PARAMS)

    virtual_time.run(run())
    assert target.infos == 1


def test_a_stream_is_the_result_in_pieces():
    """The chunks' tokens and texts, put together, are the result's; the result is there at the end and not before."""

    async def run():
        async with client() as opened, opened.stream(PROMPT, PARAMS) as stream:
            chunks = []
            async for chunk in stream:
                chunks.append(chunk)
                assert chunk.text == "".join(token.text for token in chunk.tokens)
                assert stream.tokens == tuple(token for chunk in chunks for token in chunk.tokens)
                if chunk.finish_reason is None:
                    with pytest.raises(RuntimeError):
                        _ = stream.result
            return chunks, stream.result

    chunks, result = virtual_time.run(run())
    assert len(chunks) == result.stats.rounds > 1
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert chunks[-1].finish_reason is result.finish_reason


def test_a_session_ends_politely():
    """After the last verdict both streams are ended, not just dropped."""
    target, draft = FakeTarget(), FakeDraft()
    generate(target, draft)
    assert target.streams[0].finished
    assert draft.streams[0].finished


@pytest.mark.parametrize("mode", ["draft:1", "ngram", "none"])
def test_closing_a_stream_ends_both_calls(mode):
    """A caller that stops reading leaves no call and no task behind."""

    async def run():
        target, draft = FakeTarget(), FakeDraft()
        opened = client(target, draft, mode)
        async with opened.stream(PROMPT, PARAMS) as stream:
            await anext(stream)
        assert all(call.cancelled and not call.finished for call in target.streams + draft.streams)
        assert len(target.streams) == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    virtual_time.run(run())


@pytest.mark.parametrize("mode", ["draft:1", "ngram", "none"])
def test_cancelling_a_generation_ends_both_calls(mode):
    """Cancellation while waiting for the target passes through at once and leaves nothing running."""

    async def run():
        target, draft = FakeTarget(delay=3600), FakeDraft()
        task = asyncio.create_task(client(target, draft, mode).generate(PROMPT, PARAMS))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(call.cancelled for call in target.streams + draft.streams)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    virtual_time.run(run())


def test_cancellation_is_not_mistaken_for_a_lost_draft():
    """Cancelling while waiting for the draft cancels, and does not go on with prompt lookup."""

    async def run():
        target, draft = FakeTarget(), FakeDraft(delay=3600)
        task = asyncio.create_task(client(target, draft, draft_timeout=3600).generate(PROMPT, PARAMS))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert target.blocks == []
        assert draft.streams[0].cancelled

    virtual_time.run(run())


@pytest.mark.parametrize("mode", ["draft:1", "ngram", "none"])
def test_a_deadline_ends_a_generation(mode):
    """The time limit holds for the whole call, wherever it waits; what was committed by then stays readable."""

    async def run():
        target = FakeTarget(delay=0.01)
        async with client(target, None, mode) as opened, opened.stream(PROMPT, PARAMS, timeout=0.05) as stream:
            with pytest.raises(DeadlineError):
                async for _ in stream:
                    pass
            assert list(stream.tokens) != []
            ids = [token.id for token in stream.tokens]
            assert ids == continuation(PROMPT, len(ids))
        assert all(call.cancelled for call in target.streams)

    virtual_time.run(run())


@pytest.mark.parametrize("mode", ["draft:1", "ngram", "none"])
@pytest.mark.parametrize("timeout", [float("inf"), 1e18, 9e9])
def test_a_deadline_that_never_comes_is_none(mode, timeout):
    """gRPC would take one beyond its numbers for one that has passed: the services are told of none."""
    limits = []

    class Asked(FakeTarget):
        async def verify(self, start, within=None):
            limits.append(within)
            return await super().verify(start, within)

        async def generate(self, start, within=None):
            limits.append(within)
            return await super().generate(start, within)

    assert list(generate(Asked(), None, mode, timeout=timeout).token_ids) == continuation(PROMPT, COUNT)
    assert limits == [None]


@pytest.mark.parametrize("field", ["timeout", "draft_timeout", "resume_timeout"])
def test_a_limit_that_is_no_number_is_refused(field):
    """By its name."""
    with pytest.raises(InvalidRequestError) as refused:
        generate(FakeTarget(), **{field: float("nan")})
    assert refused.value.field == field


def test_a_deadline_holds_while_the_draft_hangs():
    """A draft that may still take its time does not stretch the caller's."""
    with pytest.raises(DeadlineError):
        generate(None, FakeDraft(fakes.hanging), draft_timeout=3600, timeout=0.05, lookup=False)


def test_losing_the_target_is_an_error_with_the_tokens_so_far():
    """A client that does not resume lets the failure through; the log of committed tokens survives it."""

    async def run():
        async with client(FakeTarget(fails_after=3), resume_timeout=0) as opened:
            stream = opened.stream(PROMPT, PARAMS)
            with pytest.raises(UnavailableError):
                async for _ in stream:
                    pass
            return [token.id for token in stream.tokens]

    ids = virtual_time.run(run())
    assert len(ids) >= 3
    assert ids == continuation(PROMPT, len(ids))


def test_a_target_that_contradicts_itself_is_not_believed():
    """A verdict that cannot be true ends the generation."""
    with pytest.raises(ProtocolError):
        generate(FakeTarget(falsify=lambda verdict: replace(verdict, base_length=verdict.base_length + 1)))


def test_an_unreachable_target_is_an_error_with_every_draft():
    """Nothing replaces the target."""
    for mode in ("draft:1", "auto", "ngram", "none"):
        with pytest.raises(UnavailableError):
            generate(FakeTarget(failure=UnavailableError("connection refused")), mode=mode)


def test_generations_at_once_do_not_mix():
    """Sessions of one client share nothing but connections."""

    async def run():
        async with client(None, None, "ngram") as opened:
            prompts = [(i, i + 1, i + 2) for i in range(1, 9)]
            return prompts, await asyncio.gather(*(opened.generate(prompt, PARAMS) for prompt in prompts))

    for prompt, result in zip(*virtual_time.run(run()), strict=True):
        assert list(result.token_ids) == continuation(prompt, COUNT)


@pytest.mark.parametrize("mode", ["draft:1", "ngram", "none"])
@pytest.mark.parametrize("draft_length", [None, 0, 3])
def test_an_explanation_is_asked_for_what_would_be_proposed(mode, draft_length):
    """Without a proposal the client's proposer makes the first one of a generation, and leaves no call behind."""
    target, draft, prompt = FakeTarget(), FakeDraft(), (*continuation(PROMPT, 40),)

    async def run():
        async with client(target, draft, mode, draft_length=draft_length) as opened:
            return await opened.explain(prompt)

    explained = virtual_time.run(run())
    [question] = target.questions
    count = {"none": 0}.get(mode, 7 if draft_length is None else draft_length)
    assert list(question.token_ids) == continuation(prompt, count)
    assert [one.accepted for one in explained] == [True] * count + [False]
    assert (question.prompt, question.draft_probs) == (prompt, ())
    assert all(stream.cancelled for stream in draft.streams)
    assert target.streams == []


def test_an_explanation_of_a_given_proposal():
    """The proposal is judged as it is; neither the draft nor the length of blocks matters."""
    target, draft = FakeTarget(), FakeDraft()

    async def run():
        async with client(target, draft) as opened:
            return await opened.explain("ab", [1, 2, 3], SamplingParams(seed=5))

    assert [one.proposed_token_id for one in virtual_time.run(run())] == [1, 2, 3, None]
    [question] = target.questions
    assert (question.prompt, question.params.seed, question.token_ids) == ("ab", 5, [1, 2, 3])
    assert (draft.streams, target.infos) == ([], 0)


def test_info_health_and_text():
    """The services' own words, None for a draft that is not there."""

    async def run():
        async with client() as opened:
            assert [info.model for info in await opened.info()] == ["target", "draft"]
            assert await opened.healthy() == (True, True)
            assert await opened.tokenize("ab") == (97 % 50, 98 % 50)
            assert await opened.detokenize([1, 2]) == "<1><2>"
        async with client(None, FakeDraft(unreachable=UnavailableError("no"))) as opened:
            assert (await opened.info())[1] is None
            assert await opened.healthy() == (True, False)
        async with client(mode="ngram") as opened:
            assert (await opened.info())[1] is None
            assert await opened.healthy() == (True, None)

    virtual_time.run(run())


@pytest.mark.parametrize(
    ("options", "field"),
    [({"draft_length": -1}, "draft_length"), ({"draft_timeout": 0}, "draft_timeout"), ({"mode": "auto:"}, "draft")],
)
def test_impossible_options_are_refused(options, field):
    """An error that names the argument, before anything is sent."""
    with pytest.raises(InvalidRequestError) as refused:
        client(**options)
    assert refused.value.field == field


def test_everything_public_exists_and_is_documented():
    """`__all__` is true, sorted, and what it names has a docstring."""
    assert specpair.__all__ == sorted(specpair.__all__, key=lambda name: (name.startswith("_"), name))
    for public in specpair.__all__:
        assert getattr(specpair, public).__doc__


def test_importing_the_client_stays_light():
    """Neither torch nor transformers nor the command's libraries are loaded, nor any service."""
    code = "import json, sys, specpair; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    heavy = {"torch", "transformers", "numpy", "typer", "rich", "pydantic", "structlog"}
    services = {"specpair_runtime", "specpair_target", "specpair_draft"}
    assert not (heavy | services) & set(json.loads(loaded.stdout))
