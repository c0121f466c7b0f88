"""Laws of the conversion: nothing is lost, and what cannot be sent is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpair import wire
from specpair.errors import InvalidRequestError, ProtocolError
from specpair.messages import (
    Block,
    Committed,
    DraftAsk,
    DraftStart,
    DraftStarted,
    Explain,
    Extend,
    Fingerprint,
    Phase,
    Proposal,
    SparseDistribution,
    Start,
    Started,
    Verdict,
)
from specpair.params import AcceptanceRule, SamplingParams
from specpair.results import FinishReason, Logprobs, PositionExplanation, Source
from specpair.v1 import common_pb2, draft_pb2, target_pb2

EVERYTHING = SamplingParams(
    temperature=0.5,
    top_k=4,
    top_p=0.75,
    min_p=0.25,
    repetition_penalty=1.5,
    presence_penalty=-0.5,
    frequency_penalty=0.5,
    logit_bias={7: -2.0},
    seed=2**64 - 1,
    max_new_tokens=9,
    min_new_tokens=2,
    rule=AcceptanceRule.REJECTION,
    stop=("\n\n", "é"),
    stop_token_ids=(3, 5),
    ignore_eos=True,
    logprobs=4,
)


def test_every_parameter_reaches_the_target():
    """Each field of SamplingParams has its place in both requests that start a generation."""
    start = Start("text", EVERYTHING, (1, 2))
    extend = wire.verify_request(Extend("text", EVERYTHING)).extend
    for message in (wire.verify_request(start).start, wire.generate_request(start), extend):
        sampling = message.sampling
        for field in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"):
            assert getattr(sampling, field) == getattr(EVERYTHING, field)
        for field in ("frequency_penalty", "seed", "max_new_tokens", "min_new_tokens"):
            assert getattr(sampling, field) == getattr(EVERYTHING, field)
        assert dict(sampling.logit_bias) == {7: -2.0}
        assert sampling.rule == common_pb2.ACCEPTANCE_RULE_REJECTION
        assert list(message.stop.stop_strings) == ["\n\n", "é"]
        assert list(message.stop.stop_token_ids) == [3, 5]
        assert message.stop.ignore_eos
        assert (message.logprobs.enabled, message.logprobs.top_n) == (True, 4)
        assert message is extend or list(message.committed_token_ids) == [1, 2]
        assert message.prompt.text == "text"
    assert wire.propose_request(DraftStart((1,), EVERYTHING)).start.sampling == sampling


def test_a_text_may_be_tokenized_as_a_continuation():
    """Said only where it is meant."""
    assert wire.tokenize_request("text", continuation=True).continuation
    assert [field.name for field, _ in wire.tokenize_request("text").ListFields()] == ["prompt"]


def test_what_is_not_given_is_not_sent():
    """None leaves the choice to the server: no field is present, 0 is not sent in its place."""
    start = wire.verify_request(Start("text", SamplingParams())).start
    assert start.sampling.ListFields() == []
    assert start.stop.ListFields() == []
    assert not start.HasField("logprobs")


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"top_k": -1}, "sampling.top_k"),
        ({"top_k": 2**32}, "sampling.top_k"),
        ({"top_k": 1.5}, "sampling.top_k"),
        ({"seed": 2**64}, "sampling.seed"),
        ({"seed": -1}, "sampling.seed"),
        ({"temperature": "hot"}, "sampling.temperature"),
        ({"max_new_tokens": -1}, "sampling.max_new_tokens"),
        ({"logit_bias": {-1: 0.0}}, "sampling.logit_bias[-1]"),
        ({"logit_bias": {1: "x"}}, "sampling.logit_bias[1]"),
        ({"rule": "fair"}, "sampling.rule"),
        ({"stop": "abc"}, "stop.stop_strings"),
        ({"stop": 5}, "stop.stop_strings"),
        ({"stop": ("a", 3)}, "stop.stop_strings[1]"),
        ({"stop": ("\ud800",)}, "stop.stop_strings[0]"),
        ({"stop_token_ids": (1, -1)}, "stop.stop_token_ids[1]"),
        ({"ignore_eos": "no"}, "stop.ignore_eos"),
        ({"logprobs": -1}, "logprobs.top_n"),
    ],
)
def test_what_cannot_be_sent_is_named(params, field):
    """A value that its field cannot hold is refused with the path that the target would use."""
    start = Start((1,), SamplingParams(**params))
    with pytest.raises(InvalidRequestError) as refused:
        wire.verify_request(start)
    assert refused.value.field == f"start.{field}"
    with pytest.raises(InvalidRequestError) as refused:
        wire.verify_request(Extend((1,), SamplingParams(**params)))
    assert refused.value.field == f"extend.{field}"
    with pytest.raises(InvalidRequestError) as refused:
        wire.generate_request(start)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (None, "prompt"),
        (5, "prompt"),
        ("\ud800", "prompt.text"),
        ((1, -2), "prompt.token_ids.ids[1]"),
        ((1, 2**32), "prompt.token_ids.ids[1]"),
        (["a", "b"], "prompt.token_ids.ids[0]"),
        ([{"role": "user"}], "prompt.chat.messages[0]"),
        ([{"role": "user", "content": "x"}, 3], "prompt.chat.messages[1]"),
        ([{"role": "user", "content": 3}], "prompt.chat.messages[0].content"),
    ],
)
def test_a_prompt_that_is_none_is_named(prompt, field):
    """Text, ids or chat messages; anything else is refused where it goes wrong."""
    with pytest.raises(InvalidRequestError) as refused:
        wire.tokenize_request(prompt)
    assert refused.value.field == field


def test_the_three_kinds_of_prompts():
    """Also empty ones: whether they mean something is for the target to say."""
    assert wire.tokenize_request("").prompt.WhichOneof("content") == "text"
    assert list(wire.tokenize_request([1, 2]).prompt.token_ids.ids) == [1, 2]
    assert wire.tokenize_request(()).prompt.WhichOneof("content") == "token_ids"
    (message,) = wire.tokenize_request([{"role": "user", "content": "hi"}]).prompt.chat.messages
    assert (message.role, message.content) == ("user", "hi")


def test_blocks_and_asks():
    """Every field arrives; position 0 and id 0 are sent like others."""
    q = SparseDistribution((3, 4), (0.5, 0.5))
    block = wire.verify_request(Block(7, 5, 0, (3,), Source.NGRAM, (q,))).block
    assert (block.round, block.base_length, block.last_token_id, list(block.token_ids)) == (7, 5, 0, [3])
    assert block.HasField("last_token_id")
    assert block.source == common_pb2.SOURCE_NGRAM
    assert list(block.draft_probs[0].token_ids) == [3, 4]
    ask = wire.propose_request(DraftAsk(7, 5, (1, 2), 4, 3, 0.25)).ask
    assert (ask.round, ask.from_position, list(ask.token_ids), ask.max_tokens) == (7, 5, [1, 2], 4)
    assert (ask.proposals, ask.min_confidence) == (3, 0.25)
    start = wire.propose_request(DraftStart((1, 2), SamplingParams(), Source.NGRAM, "s")).start
    assert (list(start.token_ids), start.proposer, start.session_id) == ([1, 2], common_pb2.SOURCE_NGRAM, "s")


def test_explanations():
    """The question arrives as it was put, the answer position by position; what is not known stays None."""
    q = SparseDistribution((3, 4), (0.5, 0.5))
    request = wire.explain_request(Explain("text", EVERYTHING, [3], (q,)))
    assert (request.prompt.text, list(request.token_ids), list(request.draft_probs[0].probs)) == (
        "text",
        [3],
        [0.5, 0.5],
    )
    assert request.sampling == wire.generate_request(Start("text", EVERYTHING)).sampling
    for question, field in (
        (Explain(5, SamplingParams(), ()), "prompt"),
        (Explain("", SamplingParams(), (1, -1)), "token_ids[1]"),
        (Explain("", SamplingParams(), 5), "token_ids"),
        (Explain("", SamplingParams(top_k=-1), ()), "sampling.top_k"),
    ):
        with pytest.raises(InvalidRequestError) as refused:
            wire.explain_request(question)
        assert refused.value.field == field
    positions = [
        target_pb2.PositionExplanation(
            position=5,
            proposed_token_id=0,
            target_token_id=3,
            target_prob=0.25,
            draft_prob=0.5,
            top2_margin=1.5,
            accepted=True,
            reason="why",
        ),
        target_pb2.PositionExplanation(position=6, target_token_id=4, target_prob=0.75, top2_margin=2.5),
    ]
    assert wire.explain_response(target_pb2.ExplainVerifyResponse(positions=positions)) == (
        PositionExplanation(5, 0, 3, 0.25, 0.5, 1.5, True, "why"),
        PositionExplanation(6, None, 4, 0.75, None, 2.5, False, ""),
    )


def test_responses():
    """Messages become plain data, field by field."""
    started = target_pb2.SessionStarted(
        session_id="s", prompt_token_ids=[1, 2], cached_tokens=1, length=2, max_block_tokens=7, max_length=64
    )
    expected = Started("s", (1, 2), 1, 2, 7, 64)
    assert wire.verify_response(target_pb2.VerifyResponse(started=started)) == expected
    assert wire.generate_response(target_pb2.GenerateResponse(started=started)) == expected
    token = common_pb2.TokenLogprob(token_id=3, logprob=-0.5)
    committed = common_pb2.CommittedTokens(
        token_ids=[3],
        text_delta="é",
        text_lengths=[1],
        logprobs=[common_pb2.PositionLogprobs(chosen=token, top=[token])],
        finish_reason=common_pb2.FINISH_REASON_STOP_STRING,
        stop_string="é",
    )
    plain = Committed((3,), "é", (1,), (Logprobs(-0.5, ((3, -0.5),)),), FinishReason.STOP_STRING, "é")
    assert wire.generate_response(target_pb2.GenerateResponse(committed=committed)) == plain
    placed = wire.generate_response(target_pb2.GenerateResponse(committed=committed, base_length=9))
    assert placed == replace(plain, base_length=9)
    verdict = target_pb2.Verdict(
        round=4,
        status=target_pb2.Verdict.STATUS_APPLIED,
        base_length=2,
        accepted=1,
        committed=committed,
        queue_us=5,
        forward_us=6,
        judge_us=2,
    )
    assert wire.verify_response(target_pb2.VerifyResponse(verdict=verdict)) == Verdict(4, False, 2, 1, plain, 5, 6, 2)
    proposal = draft_pb2.Proposal(
        round=4,
        base_length=2,
        token_ids=[3],
        source=common_pb2.SOURCE_NGRAM,
        draft_probs=[common_pb2.SparseDistribution(token_ids=[3], probs=[1.0])],
        draft_us=9,
        confidence=[0.5],
        index=6,
    )
    assert wire.propose_response(draft_pb2.ProposeResponse(proposal=proposal)) == Proposal(
        4, 2, (3,), Source.NGRAM, (SparseDistribution((3,), (1.0,)),), 9, (0.5,), 6
    )
    answer = draft_pb2.ProposeStarted(proposer=common_pb2.SOURCE_MODEL, max_length=8)
    assert wire.propose_response(draft_pb2.ProposeResponse(started=answer)) == DraftStarted(Source.MODEL, 8)
    answer.fingerprint.vocabulary_size = 9
    started = wire.propose_response(draft_pb2.ProposeResponse(started=answer))
    assert started == DraftStarted(Source.MODEL, 8, Fingerprint(9))


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (wire.verify_response, target_pb2.VerifyResponse()),
        (wire.generate_response, target_pb2.GenerateResponse()),
        (wire.propose_response, draft_pb2.ProposeResponse()),
        (wire.verify_response, target_pb2.VerifyResponse(verdict=target_pb2.Verdict(round=1))),
        (wire.generate_response, target_pb2.GenerateResponse(committed={"finish_reason": 99})),
    ],
)
def test_messages_without_meaning_break_the_protocol(convert, message):
    """Empty messages and verdicts without a status are not guessed at."""
    with pytest.raises(ProtocolError):
        convert(message)


def test_model_info():
    """Absent fingerprints stay absent; unknown phases and proposers do no harm."""
    assert wire.model_info(common_pb2.ModelInfo()).fingerprint is None
    info = wire.model_info(
        common_pb2.ModelInfo(
            model="m",
            phase=common_pb2.PHASE_READY,
            fingerprint=common_pb2.Fingerprint(vocabulary_size=5, eos_token_ids=[1, 2]),
            proposers=[common_pb2.SOURCE_MODEL, 99],
        )
    )
    assert (info.phase, info.proposers) == (Phase.READY, (Source.MODEL,))
    assert (info.fingerprint.vocabulary_size, info.fingerprint.eos_token_ids) == (5, (1, 2))
    assert wire.model_info(common_pb2.ModelInfo(phase=99)).phase is Phase.UNSPECIFIED


@given(
    st.builds(
        SamplingParams,
        temperature=st.one_of(st.none(), st.floats(), st.text(max_size=3)),
        top_k=st.one_of(st.none(), st.integers(), st.floats()),
        seed=st.one_of(st.none(), st.integers()),
        logit_bias=st.one_of(st.none(), st.dictionaries(st.integers(), st.floats(), max_size=3)),
        stop=st.one_of(st.text(max_size=3), st.lists(st.one_of(st.text(max_size=3), st.integers()), max_size=3)),
        stop_token_ids=st.lists(st.one_of(st.integers(), st.none()), max_size=3),
        logprobs=st.one_of(st.none(), st.integers()),
    )
)
def test_anything_a_caller_may_give_is_sent_or_named(params):
    """Whatever stands in the parameters, either a message comes out or an error with a field."""
    try:
        field = wire.verify_request(Start((1,), params)).WhichOneof("message")
    except InvalidRequestError as refused:
        field = refused.field
    assert field.startswith("start")


@pytest.mark.parametrize(
    "prompt", [b"abc", bytearray(b"abc"), "x" * 5_000_000, [300] * 3_000_000], ids=["bytes", "bytearray", "text", "ids"]
)
def test_prompts_that_are_none_or_do_not_fit_a_message_are_refused_by_name(prompt):
    """Bytes are not taken for token ids, and a prompt beyond a message's size never reaches the wire."""
    with pytest.raises(InvalidRequestError) as refused:
        wire.tokenize_request(prompt)
    assert refused.value.field == "prompt"
