"""What the draft service reads from the wire: each bad value is refused by its exact path."""

from __future__ import annotations

import math

import pytest

from specpair.errors import InvalidRequestError, ProtocolError
from specpair.v1 import common_pb2, draft_pb2
from specpair_draft.asks import Proposal, Timed, Turn
from specpair_draft.wire import proposal_message, read_ask, read_turn
from specpair_runtime.sampling.params import GREEDY
from specpair_runtime.sampling.rejection import SparseProbs

VOCABULARY = 100


def start(**fields):
    return draft_pb2.ProposeStart(**{"token_ids": [1, 2, 3], **fields})


def ask(**fields):
    return draft_pb2.ProposeRequest(ask=draft_pb2.ProposeAsk(**{"from_position": 3, "max_tokens": 4, **fields}))


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"token_ids": []}, "start.token_ids"),
        ({"token_ids": [1, VOCABULARY]}, "start.token_ids[1]"),
        ({"token_ids": [2**32 - 1]}, "start.token_ids[0]"),
        ({"token_ids": [0] * 131_073}, "start.token_ids"),
        ({"prompt_length": 0}, "start.prompt_length"),
        ({"prompt_length": 4}, "start.prompt_length"),
        ({"session_id": "a b"}, "start.session_id"),
        ({"session_id": "line\n"}, "start.session_id"),
        ({"session_id": "x" * 129}, "start.session_id"),
        ({"sampling": {"temperature": -0.5}}, "start.sampling.temperature"),
        ({"sampling": {"temperature": math.nan}}, "start.sampling.temperature"),
        ({"sampling": {"top_p": 0.0}}, "start.sampling.top_p"),
        ({"sampling": {"logit_bias": {VOCABULARY: 1.0}}}, f"start.sampling.logit_bias[{VOCABULARY}]"),
    ],
)
def test_bad_starts(fields, path):
    """A session begins with at least one token of the vocabulary, and parameters that can be sampled with."""
    with pytest.raises(InvalidRequestError) as error:
        read_turn(start(**fields), VOCABULARY)
    assert error.value.field == path


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"max_tokens": 0}, "ask.max_tokens"),
        ({"max_tokens": 65}, "ask.max_tokens"),
        ({"proposals": 17}, "ask.proposals"),
        ({"proposals": 2**32 - 1}, "ask.proposals"),
        ({"min_confidence": -0.01}, "ask.min_confidence"),
        ({"min_confidence": 1.0}, "ask.min_confidence"),
        ({"min_confidence": math.nan}, "ask.min_confidence"),
        ({"min_confidence": math.inf}, "ask.min_confidence"),
        ({"from_position": 4}, "ask.from_position"),
        ({"from_position": 2**32 - 1}, "ask.from_position"),
        ({"from_position": 0, "token_ids": []}, "ask.from_position"),
        ({"token_ids": [VOCABULARY]}, "ask.token_ids[0]"),
        ({"token_ids": [5, 2**32 - 1]}, "ask.token_ids[1]"),
        ({"token_ids": [5] * 131_070}, "ask.token_ids"),
    ],
)
def test_bad_asks(fields, path):
    """A round replaces tokens that are there, leaves at least one, and asks for a bounded number of proposals."""
    with pytest.raises(InvalidRequestError) as error:
        read_ask(ask(**fields), 3, VOCABULARY)
    assert error.value.field == path


def test_an_empty_message_breaks_the_protocol():
    """A message that is neither start nor ask is the peer's fault, not a value's."""
    with pytest.raises(ProtocolError):
        read_ask(draft_pb2.ProposeRequest(), 3, VOCABULARY)


def test_good_starts_and_asks():
    """Values at the edges of what is allowed are read as they are; a start without parameters is greedy."""
    read = read_turn(start(token_ids=[0, VOCABULARY - 1], session_id="a:B.9_-"), VOCABULARY)
    assert read == Turn([0, VOCABULARY - 1], 2, GREEDY)
    assert read_turn(start(prompt_length=1), VOCABULARY).prompt_length == 1
    for fields in ({"from_position": 0, "token_ids": [9]}, {"from_position": 3}, {"max_tokens": 64}, {"max_tokens": 1}):
        message = ask(**fields)
        read = read_ask(message, 3, VOCABULARY)
        assert (read.from_position, list(read.token_ids), read.max_tokens) == (
            message.ask.from_position,
            message.ask.token_ids,
            message.ask.max_tokens,
        )


def test_without_a_model_any_id_will_do():
    """Prompt lookup knows no vocabulary."""
    assert read_turn(start(token_ids=[2**32 - 1]), None).token_ids == [2**32 - 1]
    assert read_ask(ask(token_ids=[2**32 - 1]), 3, None).token_ids == [2**32 - 1]


def test_one_proposal_or_as_many_as_named():
    """0 and nothing mean one; the least confidence is read as it is."""
    for fields, count in (({}, 1), ({"proposals": 0}, 1), ({"proposals": 1}, 1), ({"proposals": 16}, 16)):
        assert read_ask(ask(**fields), 3, VOCABULARY).proposals == count
    for fields, least in (({}, 0.0), ({"min_confidence": 0.25}, 0.25)):
        assert read_ask(ask(**fields), 3, VOCABULARY).min_confidence == least


def test_an_answer_carries_all_that_is_known():
    """Round, number, length, ids, distributions, confidence, source and timings."""
    guesses = Proposal([4, 5], [SparseProbs([4, 6], [0.75, 0.25]), SparseProbs([5], [1.0])], [0.75, 0.5])
    answer = proposal_message(7, common_pb2.SOURCE_MODEL, Timed(2, 3, guesses, 10, 20)).proposal
    assert answer == draft_pb2.Proposal(
        round=7,
        index=2,
        base_length=3,
        token_ids=[4, 5],
        draft_probs=[
            common_pb2.SparseDistribution(token_ids=[4, 6], probs=[0.75, 0.25]),
            common_pb2.SparseDistribution(token_ids=[5], probs=[1.0]),
        ],
        confidence=[0.75, 0.5],
        source=common_pb2.SOURCE_MODEL,
        queue_us=10,
        draft_us=20,
    )
