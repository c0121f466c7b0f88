"""Laws of predicted outputs: what is proposed at each place of an output."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpair import InvalidRequestError
from specpair.prediction import PredictedOutput, predicted_ids

from .. import virtual_time
from .fakes import FakeTarget, tokenized

PROMPT = [90, 91, 92]
TEXT = list(range(10, 40))


def follow(expected, output, steps=None):
    """What is proposed behind each beginning of an output; `steps` are the lengths at which it is asked."""
    predicted = PredictedOutput(expected, len(PROMPT))
    log = [*PROMPT, *output]
    lengths = range(len(output) + 1) if steps is None else steps
    return [predicted.find(log[: len(PROMPT) + n], len(PROMPT) + n, 7).token_ids for n in lengths]


def test_the_truth_is_proposed_from_the_first_token_to_the_last():
    """As long as the output is what was expected, so is the proposal, and no match is needed to begin."""
    assert follow(TEXT, TEXT) == [tuple(TEXT[n : n + 7]) for n in range(len(TEXT) + 1)]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ([*TEXT[:9], 77, *TEXT[10:]], TEXT[10:]),
        ([*TEXT[:9], 77, 78, *TEXT[9:]], TEXT[9:]),
        ([*TEXT[:9], *TEXT[12:]], TEXT[12:]),
        ([*TEXT[:9], 77, 78, 79, *TEXT[15:]], TEXT[15:]),
    ],
    ids=["substituted", "inserted", "deleted", "replaced"],
)
def test_it_is_met_again_behind_a_difference(output, expected):
    """Two tokens behind any difference at the latest, the proposal is what follows in the prediction."""
    behind = len(output) - len(expected) + 2
    for n, proposed in list(enumerate(follow(TEXT, output)))[behind:]:
        assert list(proposed) == output[n : n + 7]


def test_a_substituted_token_costs_no_match():
    """Behind a token that stands for another one the next ones are proposed at once."""
    assert follow(TEXT, [77])[1] == tuple(TEXT[1:8])


def test_of_equal_places_the_nearest_counts():
    """A prediction that repeats itself is met where it was left, not at its end."""
    line = [1, 2, 3]
    expected = [*line, 4, *line, 5, *line, 6, *line, 7]
    assert follow(expected, [*line, 4, *line, 99, *line])[-1][:1] == (6,)


def test_nothing_is_said_behind_the_end():
    """A prediction that has been read to its end, or that is empty, proposes nothing."""
    assert follow(TEXT, TEXT)[-1] == ()
    assert follow([], [1, 2, 3]) == [(), (), (), ()]


@given(
    st.lists(st.integers(0, 4), max_size=30),
    st.lists(st.integers(0, 4), max_size=30),
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 4), max_size=5)), max_size=6),
    st.integers(1, 8),
)
def test_an_assumed_tail_changes_nothing(expected, output, asks, most):
    """Asking behind assumed tokens leaves the reading of the committed ones alone; what is proposed stands in the
    prediction as it is."""
    predicted, twin = PredictedOutput(expected, len(PROMPT)), PredictedOutput(expected, len(PROMPT))
    for committed, tail in sorted((min(n, len(output)), tail) for n, tail in asks):
        log = [*PROMPT, *output[:committed]]
        proposed = predicted.find([*log, *tail], len(log), most).token_ids
        assert len(proposed) <= most
        assert any(tuple(expected[at : at + len(proposed)]) == proposed for at in range(len(expected) + 1))
        assert predicted.find(log, len(log), most) == twin.find(log, len(log), most)


class WithBos(FakeTarget):
    """A target whose tokenizer begins every text with two special tokens."""

    async def tokenize(self, prompt, within=None):
        if len(prompt) > 9:
            raise InvalidRequestError("too long", field="prompt")
        return (1, 2, *tokenized(prompt))

    async def detokenize(self, token_ids, keep, within=None):
        return "".join("" if token_id < 3 else f"<{token_id}>" for token_id in token_ids)


def test_text_is_tokenized_without_special_tokens():
    """The ids of a text are the target's for it, less those that the tokenizer begins every text with."""
    ids = virtual_time.run(predicted_ids(WithBos(), "abc"))
    assert ids == tuple(tokenized("abc"))
    assert virtual_time.run(predicted_ids(WithBos(), "")) == ()
    assert virtual_time.run(predicted_ids(WithBos(), [5, 1, 7])) == (5, 1, 7)


@pytest.mark.parametrize("wrong", ["a text too long", [1, -1], [2**32], ["a"], b"abc", [1.5], 7, [{"role": "user"}]])
def test_what_cannot_be_a_prediction_is_refused_by_name(wrong):
    """Neither text nor ids, ids that are none, or more than fits a slot."""
    with pytest.raises(InvalidRequestError) as refused:
        virtual_time.run(predicted_ids(WithBos(), wrong))
    assert refused.value.field == "prediction"
