"""Options that cannot be used are refused by both services under the very name of their field."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from specpair.errors import InvalidRequestError
from specpair.v1 import common_pb2, draft_pb2, target_pb2
from specpair_draft.wire import read_turn as read_draft_turn
from specpair_runtime.sampling.params import SamplingParams
from specpair_runtime.sampling.rejection import MAX_SUPPORT, SparseProbs
from specpair_target import wire

VOCABULARY = 100
LIMITS = wire.Limits(vocabulary=VOCABULARY, max_length=64, block=7, eos_token_ids=frozenset({1}))
REJECTION = SamplingParams(temperature=1.0, rejection=True)
NAN, INFINITE = math.nan, math.inf

BAD_NUMBERS = {
    "temperature": [-0.1, 0.0009, 100.5, NAN, INFINITE],
    "top_p": [0.0, -0.5, 1.001, NAN, INFINITE],
    "min_p": [-0.001, 1.001, NAN, INFINITE],
    "repetition_penalty": [0.0, -1.0, 0.0099, 100.5, NAN, INFINITE],
    "presence_penalty": [-2.001, 2.001, NAN, -INFINITE],
    "frequency_penalty": [-2.001, 2.001, NAN, -INFINITE],
}
GOOD_NUMBERS = {
    "temperature": [0.0, 0.001, 100.0],
    "top_p": [0.001, 1.0],
    "min_p": [0.0, 1.0],
    "repetition_penalty": [0.01, 100.0],
    "presence_penalty": [-2.0, 2.0],
    "frequency_penalty": [-2.0, 2.0],
}
# Entries are named by the id that is their key.
BAD_BIASES = [
    ({3: NAN}, 3),
    ({3: INFINITE}, 3),
    ({3: -1000.5}, 3),
    ({3: 1.0, 99: 1000.5}, 99),
    ({3: 1.0, 100: 1.0}, 100),
]


def bad_samplings():
    """Sampling parameters with one fault, and the field at fault."""
    for name, values in BAD_NUMBERS.items():
        for value in values:
            yield pytest.param(common_pb2.SamplingParams(**{name: value}), name, id=f"{name}={value}")
    for bias, token_id in BAD_BIASES:
        sampling = common_pb2.SamplingParams(logit_bias=bias)
        yield pytest.param(sampling, f"logit_bias[{token_id}]", id=f"logit_bias={bias}")
    yield pytest.param(common_pb2.SamplingParams(rule=99), "rule", id="rule=99")


def target_turn(sampling=None, vocabulary=VOCABULARY, **fields):
    request = target_pb2.SessionStart(sampling=sampling, **fields)
    return wire.read_turn(request, replace(LIMITS, vocabulary=vocabulary), text=True, prefix="start.")


def draft_turn(sampling, vocabulary=VOCABULARY, **fields):
    request = draft_pb2.ProposeStart(**{"token_ids": [1, 2, 3], **fields}, sampling=sampling)
    return read_draft_turn(request, vocabulary)


@pytest.mark.parametrize("read", [target_turn, draft_turn])
@pytest.mark.parametrize(("sampling", "field"), list(bad_samplings()))
def test_both_services_name_the_sampling_parameter(read, sampling, field):
    """A parameter out of its bounds, or not a number, is refused at either service under its own path."""
    with pytest.raises(InvalidRequestError) as refused:
        read(sampling)
    assert refused.value.field == f"start.sampling.{field}"


@pytest.mark.parametrize("read", [target_turn, draft_turn])
def test_too_many_biases_are_refused(read):
    """The number of biased ids is bounded."""
    sampling = common_pb2.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))
    with pytest.raises(InvalidRequestError) as refused:
        read(sampling, vocabulary=2000)
    assert refused.value.field == "start.sampling.logit_bias"


@pytest.mark.parametrize("read", [target_turn, draft_turn])
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in GOOD_NUMBERS.items() for value in values]
)
def test_bounds_themselves_are_taken(read, name, value):
    """The ends of each range are in it, and arrive as they were sent."""
    turn = read(common_pb2.SamplingParams(**{name: value}))
    params = turn.sampling if read is target_turn else turn.params
    assert getattr(params, name) == pytest.approx(value)


@pytest.mark.parametrize("read", [target_turn, draft_turn])
def test_every_parameter_arrives(read):
    """No parameter is lost on its way into either service, and the defaults are those that change nothing."""
    sampling = common_pb2.SamplingParams(
        rule=common_pb2.ACCEPTANCE_RULE_REJECTION,
        temperature=0.5,
        top_k=7,
        top_p=0.75,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.125,
        logit_bias={9: -2.0, 4: 8.0},
        seed=2**64 - 1,
        min_new_tokens=3,
    )
    expected = SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.75,
        min_p=0.25,
        seed=-1,
        rejection=True,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.125,
        logit_bias=((4, 8.0), (9, -2.0)),
        min_new_tokens=3,
    )
    for sent, params in ((sampling, expected), (common_pb2.SamplingParams(), SamplingParams())):
        turn = read(sent)
        assert (turn.sampling if read is target_turn else turn.params) == params


@pytest.mark.parametrize("prompt_length", [0, 4])
def test_a_draft_names_the_prompt_length(prompt_length):
    """The prompt is at least one and at most all of a draft's tokens."""
    with pytest.raises(InvalidRequestError) as refused:
        draft_turn(None, prompt_length=prompt_length)
    assert refused.value.field == "start.prompt_length"


# --- log probabilities ----------------------------------------------------------------------------------------------


def test_too_many_logprobs_are_refused():
    """At most 20 of the most probable tokens are reported."""
    with pytest.raises(InvalidRequestError) as refused:
        target_turn(logprobs=common_pb2.LogprobsOptions(enabled=True, top_n=21))
    assert refused.value.field == "start.logprobs.top_n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, None), ({"enabled": True}, 0), ({"top_n": 20}, 20), ({"enabled": True, "top_n": 2}, 2)],
    ids=str,
)
def test_logprobs_are_read_as_asked(options, expected):
    """None unless asked for; asking for the most probable tokens asks for the chosen one too."""
    assert target_turn(logprobs=common_pb2.LogprobsOptions(**options)).top_logprobs == expected


# --- what proposals were sampled from -------------------------------------------------------------------------------


def sparse(ids, probs):
    return common_pb2.SparseDistribution(token_ids=ids, probs=probs)


GOOD = sparse([5, 6], [0.25, 0.75])
SPREAD = [1 / 65] * 65


@pytest.mark.parametrize(
    ("draft_probs", "field"),
    [
        pytest.param([GOOD], "draft_probs", id="too few"),
        pytest.param([GOOD] * 3, "draft_probs", id="too many"),
        pytest.param([GOOD, sparse([5, 6], [1.0])], "draft_probs[1].probs", id="fewer probabilities than ids"),
        pytest.param([GOOD, sparse([5], [0.5, 0.5])], "draft_probs[1].probs", id="more probabilities than ids"),
        pytest.param([GOOD, sparse([], [])], "draft_probs[1].probs", id="empty"),
        pytest.param([sparse([5, 5], [0.5, 0.5]), GOOD], "draft_probs[0].token_ids", id="an id twice"),
        pytest.param([GOOD, sparse(range(65), SPREAD)], "draft_probs[1].token_ids", id="65 ids"),
        pytest.param([GOOD, sparse([5, 100], [0.5, 0.5])], "draft_probs[1].token_ids[1]", id="outside the vocabulary"),
        pytest.param([sparse([5, 6], [0.5, 0.4]), GOOD], "draft_probs[0].probs", id="less than 1"),
        pytest.param([sparse([5, 6], [0.5, 0.6]), GOOD], "draft_probs[0].probs", id="more than 1"),
        pytest.param([sparse([5, 6], [1.5, -0.5]), GOOD], "draft_probs[0].probs", id="a negative one"),
        pytest.param([sparse([5, 6], [NAN, 1.0]), GOOD], "draft_probs[0].probs", id="not a number"),
        pytest.param([sparse([5, 6], [INFINITE, 0.0]), GOOD], "draft_probs[0].probs", id="infinite"),
        pytest.param([GOOD, sparse([7, 8], [0.5, 0.5])], "draft_probs[1].probs", id="without the proposed id"),
        pytest.param([GOOD, sparse([6, 8], [0.0, 1.0])], "draft_probs[1].probs", id="proposed id impossible"),
    ],
)
def test_malformed_draft_probs_are_refused_by_name(draft_probs, field):
    """Each way in which the distributions of a block can be wrong is refused under the path of the part at fault."""
    block = target_pb2.Block(token_ids=[5, 6], draft_probs=draft_probs)
    with pytest.raises(InvalidRequestError) as refused:
        wire.read_draft_probs(block, REJECTION, LIMITS, "block.")
    assert refused.value.field == f"block.{field}"


def test_draft_probs_need_the_rejection_rule():
    """Under the coupled rule they would mean nothing, and are refused rather than ignored."""
    block = target_pb2.Block(token_ids=[5], draft_probs=[GOOD])
    with pytest.raises(InvalidRequestError) as refused:
        wire.read_draft_probs(block, SamplingParams(temperature=1.0), LIMITS, "block.")
    assert refused.value.field == "block.draft_probs"


def test_good_draft_probs_arrive():
    """Well-formed distributions arrive as they were sent, up to the largest support; none at all is well-formed too."""
    largest = sparse(range(MAX_SUPPORT), [1 / MAX_SUPPORT] * MAX_SUPPORT)
    block = target_pb2.Block(token_ids=[5, 6], draft_probs=[GOOD, largest])
    read = wire.read_draft_probs(block, REJECTION, LIMITS, "block.")
    assert read == [SparseProbs([5, 6], [0.25, 0.75]), SparseProbs(list(range(64)), [1 / 64] * 64)]
    assert wire.read_draft_probs(target_pb2.Block(token_ids=[5, 6]), REJECTION, LIMITS, "block.") == []
