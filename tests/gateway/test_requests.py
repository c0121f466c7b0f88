"""Fields of requests become options of the client, or an error that names them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from specpair import InvalidRequestError, SamplingParams, UnsupportedError
from specpair_gateway.requests import ChatRequest, CompletionRequest

HELLO = [{"role": "user", "content": "Hello"}]
PNG = {"type": "image_url", "image_url": {"url": "data:"}}


def completion(**fields):
    return CompletionRequest.model_validate({"model": "m", "prompt": "x", **fields})


def chat(**fields):
    return ChatRequest.model_validate({"model": "m", "messages": HELLO, **fields})


def params(request):
    [job] = request.jobs(16)
    return job.params


def refused(request, most=16):
    with pytest.raises(InvalidRequestError) as caught:
        request.jobs(most)
    return caught.value


@pytest.mark.parametrize("make", [completion, chat])
def test_every_sampling_field_arrives(make):
    """What OpenAI and vLLM call it, and what the client calls it."""
    fields = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["a", "b"],
        "seed": 11,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"5": -100, "6": 0.5},
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "min_tokens": 3,
        "stop_token_ids": [8, 9],
        "ignore_eos": True,
    }
    assert params(make(**fields)) == SamplingParams(
        max_new_tokens=7,
        temperature=0.5,
        top_p=0.9,
        stop=("a", "b"),
        seed=11,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={5: -100.0, 6: 0.5},
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        min_new_tokens=3,
        stop_token_ids=(8, 9),
        ignore_eos=True,
    )


def test_defaults_are_those_of_openai():
    """Temperature 1, as long as there is room in a chat, 16 tokens in a completion, a seed that nobody has chosen."""
    assert params(chat(seed=1)) == SamplingParams(temperature=1.0, seed=1)
    assert params(completion(seed=1)) == SamplingParams(temperature=1.0, seed=1, max_new_tokens=16)
    assert len({params(chat()).seed for _ in range(4)}) > 1


def test_null_is_as_if_it_were_not_there():
    """For every field that may be left out, known or not."""
    left_out = [name for name, field in ChatRequest.model_fields.items() if not field.is_required()]
    nothing = dict.fromkeys([*left_out, "tools", "response_format", "audio", "anything"])
    assert params(chat(**{**nothing, "seed": 1})) == params(chat(seed=1))


def test_a_stop_string_may_stand_alone():
    """One is a list of one."""
    assert params(completion(stop="end")).stop == ("end",)


def test_lengths_of_a_chat():
    """The newer field goes before the older one."""
    assert params(chat(max_tokens=3)).max_new_tokens == 3
    assert params(chat(max_tokens=3, max_completion_tokens=5)).max_new_tokens == 5


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one", ["one"]),
        ([1, 2, 3], [[1, 2, 3]]),
        (["one", "two"], ["one", "two"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts(prompt, prompts):
    """Text, ids, or several of either."""
    assert [job.prompt for job in completion(prompt=prompt).jobs(16)] == prompts


@pytest.mark.parametrize("prompt", [[], [1, "x"], ["x", [1]], [[]], [True], 5, {"text": "x"}, [1.5]])
def test_what_is_no_prompt(prompt):
    """Anything else is refused."""
    with pytest.raises(ValidationError) as caught:
        completion(prompt=prompt)
    assert {error["loc"][0] for error in caught.value.errors()} == {"prompt"}


def test_choices_have_seeds_of_their_own():
    """Choice i of each prompt is what the seed plus i says to it; the last one follows the highest by 0."""
    jobs = completion(prompt=["one", "two"], n=2, seed=5).jobs(4)
    assert [(job.prompt, job.params.seed) for job in jobs] == [("one", 5), ("one", 6), ("two", 5), ("two", 6)]
    assert [job.params.seed for job in completion(n=2, seed=2**64 - 1).jobs(4)] == [2**64 - 1, 0]


def test_there_are_not_too_many_choices():
    """All prompts of a request count, and the field that makes them many is named."""
    assert refused(completion(n=5), most=4).field == "n"
    assert refused(completion(prompt=["x"] * 5), most=4).field == "prompt"
    assert refused(chat(n=0)).field == "n"


class TestMessages:
    """A conversation is roles and texts."""

    def test_parts_are_joined_as_they_are(self):
        """Text parts stand behind each other."""
        content = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
        [job] = chat(messages=[{"role": "user", "content": content, "name": None, "tool_calls": []}]).jobs(1)
        assert job.prompt == HELLO

    def test_a_developer_is_the_system(self):
        """Templates know the older name."""
        [job] = chat(messages=[{"role": "developer", "content": "Be brief."}, *HELLO]).jobs(1)
        assert job.prompt == [{"role": "system", "content": "Be brief."}, *HELLO]

    @pytest.mark.parametrize(
        ("message", "field"),
        [
            ({"role": "user"}, "content"),
            ({"role": "user", "content": None}, "content"),
            ({"role": "user", "content": 5}, "content"),
            ({"role": 5, "content": "x"}, "role"),
            ({"content": "x"}, "role"),
            ({"role": "user", "content": [PNG]}, "content[0]"),
            ({"role": "user", "content": [{"type": "text", "text": "x"}, "y"]}, "content[1]"),
            ({"role": "user", "content": [{"type": "text"}]}, "content[0].text"),
            ({"role": "user", "content": "x", "name": "Bob"}, "name"),
            ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "tool_calls"),
            ({"role": "tool", "content": "x", "tool_call_id": "1"}, "tool_call_id"),
        ],
    )
    def test_what_is_no_message(self, message, field):
        """Images, tools and the rest are refused by their place."""
        assert refused(chat(messages=[*HELLO, message])).field == f"messages[1].{field}"

    def test_there_is_one(self):
        """No conversation is none."""
        assert refused(chat(messages=[])).field == "messages"


class TestPrediction:
    """OpenAI's predicted outputs are the client's prediction."""

    @pytest.mark.parametrize("content", ["abc", [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]])
    def test_it_arrives(self, content):
        """As text or text parts."""
        [job] = chat(prediction={"type": "content", "content": content}).jobs(1)
        assert job.prediction == "abc"

    def test_what_is_none(self):
        """Another type, or no text."""
        assert refused(chat(prediction={"type": "image"})).field == "prediction.type"
        assert refused(chat(prediction={"type": "content"})).field == "prediction.content"


class TestLogprobs:
    """Each endpoint has its own way to ask."""

    def test_of_a_chat(self):
        """A switch and a number."""
        assert params(chat()).logprobs is None
        assert params(chat(logprobs=False)).logprobs is None
        assert params(chat(logprobs=True)).logprobs == 0
        assert params(chat(logprobs=True, top_logprobs=3)).logprobs == 3
        assert refused(chat(top_logprobs=3)).field == "top_logprobs"

    def test_of_a_completion(self):
        """A number."""
        assert params(completion()).logprobs is None
        assert params(completion(logprobs=2)).logprobs == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"functions": [{}]},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["audio"]},
        {"audio": {}},
        {"echo": True},
        {"best_of": 2},
        {"suffix": "x"},
        {"guided_json": {}},
        {"tempreature": 0.5},
    ],
)
def test_what_would_change_the_output_is_refused(fields):
    """A field that is not carried out, or not known, is never passed over."""
    error = refused(completion(**fields))
    assert isinstance(error, UnsupportedError)
    assert [error.field] == list(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "somebody"},
        {"metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {"echo": False, "best_of": 1, "suffix": ""},
    ],
)
def test_what_changes_nothing_is_ignored(fields):
    """As callers send it by habit."""
    assert params(completion(seed=1, **fields)) == params(completion(seed=1))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": "2"}, "n"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options"),
        ({"model": None}, "model"),
    ],
)
def test_types_are_checked(fields, field):
    """Nothing is read as something else."""
    with pytest.raises(ValidationError) as caught:
        completion(**fields)
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


def test_biases_are_of_ids():
    """JSON has no other keys than text."""
    assert refused(completion(logit_bias={"hello": 1.0})).field == "logit_bias.hello"
    assert refused(completion(logit_bias={"-1": 1.0})).field == "logit_bias.-1"
    assert refused(completion(logit_bias={"9" * 5000: 1.0})).field == f"logit_bias.{'9' * 32}"


def test_stream_options_are_of_streams():
    """As OpenAI has it."""
    assert refused(completion(stream_options={"include_usage": True})).field == "stream_options"
    assert completion(stream=True, stream_options={"include_usage": True}).include_usage
