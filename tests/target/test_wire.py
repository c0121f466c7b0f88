"""What the target service reads from the wire: bad values are refused by their exact paths, good ones read as sent."""

from __future__ import annotations

import math

import pytest
from tokenizers.processors import TemplateProcessing

from specpair.errors import InvalidRequestError, UnsupportedError
from specpair.v1 import common_pb2, target_pb2
from specpair_runtime.sampling.params import GREEDY, SamplingParams
from specpair_runtime.sampling.rejection import SparseProbs
from specpair_runtime.wire import read_sampling
from specpair_target import wire
from specpair_target.blocks import Stale
from specpair_target.prompts import Prompts
from specpair_target.sessions import Commit, Session, TurnOptions

from ..tiny import tiny_tokenizer

VOCABULARY, LENGTH, BLOCK = 100, 20, 7
EOS = frozenset({2})
LIMITS = wire.Limits(VOCABULARY, LENGTH, BLOCK, EOS)
TOKENIZER = tiny_tokenizer()
IDS = len(TOKENIZER)
NAN, INFINITY = math.nan, math.inf
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}A{% endif %}"


def refusal(read, *args, **kwargs):
    """The path that a refusal names."""
    with pytest.raises(InvalidRequestError) as error:
        read(*args, **kwargs)
    assert error.value.message
    return error.value.field


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "temperature": (-0.001, -1.0, 100.5, NAN, INFINITY, -INFINITY, 1e-4, 1e-40),
        "top_p": (0.0, -0.5, 1.01, NAN, INFINITY),
        "min_p": (-0.1, 1.1, NAN),
        "repetition_penalty": (0.0, -1.0, 0.009, 101.0, NAN, INFINITY),
        "presence_penalty": (-2.1, 2.1, NAN, INFINITY),
        "frequency_penalty": (-2.1, 2.1, NAN, -INFINITY),
    }.items(),
)
def test_numbers_out_of_bounds(name, values):
    """Each number has its bounds, and what is no number is within none."""
    for value in values:
        message = common_pb2.SamplingParams(**{name: value})
        assert refusal(read_sampling, message, VOCABULARY, "start.sampling") == f"start.sampling.{name}"


@pytest.mark.parametrize(
    ("bias", "path"),
    [
        ({VOCABULARY: 1.0}, "sampling.logit_bias[100]"),
        ({5: NAN}, "sampling.logit_bias[5]"),
        ({5: INFINITY}, "sampling.logit_bias[5]"),
        ({5: -1001.0}, "sampling.logit_bias[5]"),
        (dict.fromkeys(range(1025), 1.0), "sampling.logit_bias"),
    ],
)
def test_bad_biases(bias, path):
    """A bias names ids of the vocabulary, not too many, and finite numbers."""
    vocabulary = 10_000 if len(bias) > 1 else VOCABULARY
    assert refusal(read_sampling, common_pb2.SamplingParams(logit_bias=bias), vocabulary, "sampling") == path


def test_a_rule_that_does_not_exist():
    """A number that names no rule of this version is not taken for the default."""
    with pytest.raises(UnsupportedError) as error:
        read_sampling(common_pb2.SamplingParams(rule=7), VOCABULARY, "sampling")
    assert error.value.field == "sampling.rule"


def test_good_sampling_is_read_as_sent():
    """Nothing given is greedy; edges of the bounds are allowed; a seed keeps its 64 bits."""
    assert read_sampling(common_pb2.SamplingParams(), VOCABULARY, "") == GREEDY
    edges = common_pb2.SamplingParams(
        rule=common_pb2.ACCEPTANCE_RULE_REJECTION,
        temperature=100.0,
        top_k=2**32 - 1,
        top_p=1.0,
        min_p=1.0,
        repetition_penalty=0.01,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias={99: -1000.0, 0: 1000.0},
        seed=2**64 - 1,
        min_new_tokens=3,
    )
    assert read_sampling(edges, VOCABULARY, "") == SamplingParams(
        temperature=100.0,
        top_k=2**32 - 1,
        top_p=1.0,
        min_p=1.0,
        seed=-1,
        rejection=True,
        repetition_penalty=edges.repetition_penalty,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=((0, 1000.0), (99, -1000.0)),
        min_new_tokens=3,
    )
    for seed in (0, 1, 2**63 - 1, 2**63, 2**64 - 1):
        assert read_sampling(common_pb2.SamplingParams(seed=seed), None, "").seed % 2**64 == seed


# --- turns -----------------------------------------------------------------------------------------------------------


def start(**fields):
    return target_pb2.SessionStart(**fields)


def read_turn(request, text=True):
    return wire.read_turn(request, LIMITS, text=text, prefix="start.")


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"sampling": {"max_new_tokens": 0}}, "sampling.max_new_tokens"),
        ({"sampling": {"temperature": -1.0}}, "sampling.temperature"),
        ({"stop": {"stop_strings": ["x"] * 17}}, "stop.stop_strings"),
        ({"stop": {"stop_strings": ["x", ""]}}, "stop.stop_strings[1]"),
        ({"stop": {"stop_strings": ["x" * 257]}}, "stop.stop_strings[0]"),
        ({"stop": {"stop_token_ids": [1] * 65}}, "stop.stop_token_ids"),
        ({"stop": {"stop_token_ids": [1, VOCABULARY]}}, "stop.stop_token_ids[1]"),
        ({"logprobs": {"enabled": True, "top_n": 21}}, "logprobs.top_n"),
        ({"logprobs": {"top_n": 2**32 - 1}}, "logprobs.top_n"),
    ],
)
def test_bad_turns(fields, path):
    """Sampling, stop criteria and log probabilities of a turn, by their paths from the request on."""
    assert refusal(read_turn, start(**fields)) == f"start.{path}"
    assert refusal(wire.read_turn, target_pb2.GenerateRequest(**fields), LIMITS, text=True, prefix="") == path


def test_stop_strings_need_a_tokenizer():
    """A model without text cannot look for one."""
    request = start(stop={"stop_strings": ["x"]})
    assert refusal(read_turn, request, text=False) == "start.stop.stop_strings"


def test_good_turns_are_read_as_sent():
    """The model's own ends count unless they are to be ignored; edges of the bounds are allowed."""
    assert read_turn(start()) == TurnOptions(stop_token_ids=EOS)
    assert read_turn(start(stop={"ignore_eos": True})) == TurnOptions()
    edges = start(
        sampling={"max_new_tokens": 1},
        stop={"stop_strings": ["x" * 256, *"abcdefghijklmno"], "stop_token_ids": range(64), "ignore_eos": True},
        logprobs={"enabled": True, "top_n": 20},
    )
    assert read_turn(edges) == TurnOptions(
        top_logprobs=20,
        max_new_tokens=1,
        stop_token_ids=frozenset(range(64)),
        stop_strings=("x" * 256, *"abcdefghijklmno"),
    )
    assert read_turn(start(logprobs={"enabled": True})).top_logprobs == 0
    assert read_turn(start(logprobs={"enabled": False})).top_logprobs is None


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def templated():
    """A tokenizer with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read_prompt(prompt, tokenizer=TOKENIZER, vocabulary=IDS):
    limits = wire.Limits(vocabulary, LENGTH, BLOCK, EOS)
    prompts = Prompts(tokenizer, LENGTH, vocabulary)
    return wire.read_prompt(common_pb2.Prompt(**prompt), prompts, limits, "start.prompt")


def conversation(*contents):
    return {"chat": {"messages": [{"role": "user", "content": content} for content in contents]}}


@pytest.mark.parametrize(
    ("prompt", "path"),
    [
        ({}, ""),
        ({"text": ""}, ".text"),
        ({"text": "x" * 1000}, ".text"),
        ({"token_ids": {}}, ".token_ids"),
        ({"token_ids": {"ids": [1, IDS]}}, ".token_ids.ids[1]"),
        ({"token_ids": {"ids": [2**32 - 1]}}, ".token_ids.ids[0]"),
        ({"token_ids": {"ids": [1] * (LENGTH + 1)}}, ".token_ids"),
        ({"chat": {}}, ".chat.messages"),
        (conversation("x" * 1000), ".chat"),
    ],
)
def test_bad_prompts(templated, prompt, path):
    """A prompt has at least one token, no more than the slot has positions, and ids of the vocabulary alone."""
    assert refusal(read_prompt, prompt, templated) == f"start.prompt{path}"


def test_prompts_that_a_model_cannot_read(templated):
    """Text needs a tokenizer of the model's own ids, a conversation a template that takes it."""
    assert refusal(read_prompt, {"text": "x"}, None) == "start.prompt.text"
    assert refusal(read_prompt, conversation("x"), None) == "start.prompt.chat"
    assert refusal(read_prompt, conversation("x"), TOKENIZER) == "start.prompt.chat"
    assert refusal(read_prompt, {"text": "x"}, TOKENIZER, vocabulary=3) == "start.prompt.text[0]"
    templated.chat_template = "{{ raise_exception('no users') }}"
    assert refusal(read_prompt, conversation("x"), templated) == "start.prompt.chat.messages"


def test_good_prompts(templated):
    """Text is tokenized as the tokenizer does by default, ids are taken as they are, chats are rendered once."""
    assert read_prompt({"text": "stop the"}).token_ids == TOKENIZER("stop the")["input_ids"]
    for ids in ([5], [5] * LENGTH):
        assert read_prompt({"token_ids": {"ids": ids}}).token_ids == ids
    chat = conversation("a", "b")
    assert TOKENIZER.decode(read_prompt(chat, templated).token_ids) == "user:a;user:b;A"
    chat["chat"]["add_generation_prompt"] = False
    assert TOKENIZER.decode(read_prompt(chat, templated).token_ids) == "user:a;user:b;"


def test_a_continuation_has_no_special_tokens():
    """Text that stands behind an earlier turn, whether that is there or not, begins no second time."""
    tokenizer = tiny_tokenizer()
    begin = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
    prompts, limits = Prompts(tokenizer, LENGTH, len(tokenizer)), wire.Limits(len(tokenizer), LENGTH, BLOCK, EOS)
    text = common_pb2.Prompt(text="stop the")
    begun = wire.read_prompt(text, prompts, limits, "prompt").token_ids
    added = wire.read_prompt(text, prompts, limits, "prompt", continuation=True).token_ids
    assert begun == [tokenizer.bos_token_id, *added]
    session = Session("s", begun, len(begun), LENGTH, TurnOptions(), None)
    assert wire.read_prompt(text, prompts, limits, "prompt", session).token_ids == [*begun, *added]
    ids = common_pb2.Prompt(token_ids={"ids": [5]})
    assert wire.read_prompt(ids, prompts, limits, "prompt", continuation=True).token_ids == [5]


def test_committed_tokens():
    """With the prompt they fit the slot, and they are ids of the vocabulary."""
    assert wire.read_committed([1, 2], LENGTH - 2, LIMITS, "c") == [1, 2]
    assert refusal(wire.read_committed, [1, 2], LENGTH - 1, LIMITS, "c") == "c"
    assert refusal(wire.read_committed, [1, VOCABULARY], 1, LIMITS, "c") == "c[1]"


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_proposals():
    """At most as many ids as a block carries, all of the vocabulary; none is fine."""
    for ids in ([], [0], [VOCABULARY - 1] * BLOCK):
        wire.check_proposal(ids, LIMITS, "block.token_ids")
    assert refusal(wire.check_proposal, [1] * (BLOCK + 1), LIMITS, "block.token_ids") == "block.token_ids"
    assert refusal(wire.check_proposal, [1, 2, VOCABULARY], LIMITS, "block.token_ids") == "block.token_ids[2]"


REJECTION = SamplingParams(temperature=1.0, rejection=True)


def block(*distributions, token_ids=(5, 6)):
    return target_pb2.Block(
        token_ids=token_ids,
        draft_probs=[common_pb2.SparseDistribution(token_ids=ids, probs=probs) for ids, probs in distributions],
    )


@pytest.mark.parametrize(
    ("second", "path"),
    [
        (([6, 7], [1.0]), ".probs"),
        (([6, 6], [0.5, 0.5]), ".token_ids"),
        ((range(65), [1 / 65] * 65), ".token_ids"),
        (([6, VOCABULARY], [0.5, 0.5]), ".token_ids[1]"),
        (([6, 7], [0.5, 0.4]), ".probs"),
        (([6, 7], [1.5, -0.5]), ".probs"),
        (([6, 7], [NAN, 1.0]), ".probs"),
        (([7], [1.0]), ".probs"),
        (([6, 7], [0.0, 1.0]), ".probs"),
        (([], []), ".probs"),
    ],
)
def test_bad_draft_probs(second, path):
    """A distribution is one, over few ids of the vocabulary, and the proposed id is among them."""
    request = block(([5], [1.0]), second)
    assert refusal(wire.read_draft_probs, request, REJECTION, LIMITS, "block.") == f"block.draft_probs[1]{path}"


def test_draft_probs_belong_to_proposals_and_to_the_rejection_rule():
    """One for each proposal or none, and none under the coupled rule."""
    one = block(([5], [1.0]))
    assert refusal(wire.read_draft_probs, one, REJECTION, LIMITS, "block.") == "block.draft_probs"
    assert refusal(wire.read_draft_probs, one, GREEDY, LIMITS, "") == "draft_probs"
    assert wire.read_draft_probs(block(), GREEDY, LIMITS, "") == []
    both = block(([5], [1.0]), ([7, 6], [0.25, 0.75]))
    assert wire.read_draft_probs(both, REJECTION, LIMITS, "") == [
        SparseProbs([5], [1.0]),
        SparseProbs([7, 6], [0.25, 0.75]),
    ]


# --- answers ---------------------------------------------------------------------------------------------------------


def session_of(tokens, prompt_length):
    return Session(
        id="s", tokens=tokens, prompt_length=prompt_length, max_length=LENGTH, options=TurnOptions(), text=None
    )


def test_a_start_is_answered_with_the_state_of_the_session():
    """The prompt's ids, how many tokens the slot held before, and where the next block begins."""
    answer = wire.started(session_of([1, 2, 3, 4], 3), LIMITS, 1, "ab")
    assert answer == target_pb2.SessionStarted(
        session_id="s",
        prompt_token_ids=[2, 3],
        cached_tokens=1,
        length=4,
        max_block_tokens=BLOCK,
        max_length=LENGTH,
        identity="ab",
    )


def test_a_stale_block_is_answered_with_the_present_length():
    """So that the sender can find back."""
    answer = wire.verdict(3, Stale(4), slots_in_use=2)
    assert answer == target_pb2.Verdict(round=3, status=target_pb2.Verdict.STATUS_STALE, base_length=4, slots_in_use=2)


def test_text_lengths_count_code_points():
    """They say which token added what, also where characters take several bytes."""
    commit = Commit([1, 2, 3], ["a", "", "😀é"], (), common_pb2.FINISH_REASON_STOP_STRING, "x")
    message = wire.committed_message(commit)
    assert (message.text_delta, list(message.text_lengths)) == ("a😀é", [1, 0, 2])
    assert (message.finish_reason, message.stop_string) == (common_pb2.FINISH_REASON_STOP_STRING, "x")
