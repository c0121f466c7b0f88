"""Every field that a request can carry has a bound that is checked, or a reason why any value will do."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from specpair.errors import InvalidRequestError
from specpair.v1 import common_pb2, draft_pb2, target_pb2
from specpair_draft import wire as draft_wire
from specpair_draft.config import DraftConfig
from specpair_draft.engine import Engine as DraftEngine
from specpair_runtime.sampling.params import GREEDY, SamplingParams
from specpair_target import wire
from specpair_target.prompts import Prompts

from .tiny import tiny_tokenizer

VOCABULARY = 100
LIMITS = wire.Limits(vocabulary=VOCABULARY, max_length=64, block=7, eos_token_ids=frozenset({1}))
TEXT = "x" * 70_000
NAN = float("nan")


def read_prompt(**content):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    wire.read_prompt(
        common_pb2.Prompt(**content), Prompts(tokenizer, LIMITS.max_length, len(tokenizer)), LIMITS, "prompt"
    )


def read_chat(*messages):
    read_prompt(chat=common_pb2.Chat(messages=[common_pb2.ChatMessage(**message) for message in messages]))


def read_turn(**fields):
    wire.read_turn(target_pb2.SessionStart(**fields), LIMITS, text=True, prefix="")


def read_stop(**fields):
    read_turn(stop=common_pb2.StopCriteria(**fields))


def read_sampling(vocabulary=VOCABULARY, **fields):
    request = target_pb2.SessionStart(sampling=common_pb2.SamplingParams(**fields))
    wire.read_turn(request, replace(LIMITS, vocabulary=vocabulary), text=True, prefix="")


def read_block(sampling=GREEDY, **fields):
    wire.read_blocks(target_pb2.Block(**fields), sampling, LIMITS)


def read_distribution(ids, probs):
    distribution = common_pb2.SparseDistribution(token_ids=ids, probs=probs)
    read_block(SamplingParams(temperature=1.0, rejection=True), token_ids=[5], draft_probs=[distribution])


def read_explain(**fields):
    request = target_pb2.ExplainVerifyRequest(**fields)
    wire.check_proposal(request.token_ids, LIMITS, "token_ids")
    wire.read_draft_probs(request, GREEDY, LIMITS, "")


def read_draft_start(**fields):
    draft_wire.read_turn(draft_pb2.ProposeStart(**{"token_ids": [1], **fields}), VOCABULARY)


def read_ask(**fields):
    ask = draft_pb2.ProposeAsk(**{"max_tokens": 1, "from_position": 5, **fields})
    draft_wire.read_ask(draft_pb2.ProposeRequest(ask=ask), 5, VOCABULARY)


def open_proposer(source):
    async def opened():
        engine = DraftEngine(DraftConfig(proposer="ngram"), None)
        try:
            async with engine.proposer(source):
                pass
        finally:
            engine.stop()

    asyncio.run(opened())


BIASES = dict.fromkeys(range(1025), 1.0)

# By field: calls with a value out of bounds, and the path that is to be named.
BOUNDED = {
    "Prompt.text": [(lambda: read_prompt(text=TEXT), "prompt.text"), (lambda: read_prompt(text=""), "prompt.text")],
    "TokenIds.ids": [
        (lambda: read_prompt(token_ids=common_pb2.TokenIds(ids=[1] * 65)), "prompt.token_ids"),
        (lambda: read_prompt(token_ids=common_pb2.TokenIds(ids=[1, VOCABULARY])), "prompt.token_ids.ids[1]"),
        (lambda: read_prompt(token_ids=common_pb2.TokenIds()), "prompt.token_ids"),
    ],
    "Chat.messages": [
        (lambda: read_chat(), "prompt.chat.messages"),
        (lambda: read_chat(*[{"role": "user"}] * 4097), "prompt.chat.messages"),
    ],
    "ChatMessage.role": [
        (lambda: read_chat({"role": "user"}, {"role": "u" * 65}), "prompt.chat.messages[1].role"),
    ],
    "ChatMessage.content": [
        (lambda: read_chat(*[{"role": "user", "content": TEXT[:35_000]}] * 2), "prompt.chat.messages"),
    ],
    "SamplingParams.rule": [(lambda: read_sampling(rule=99), "sampling.rule")],
    "SamplingParams.temperature": [(lambda: read_sampling(temperature=NAN), "sampling.temperature")],
    "SamplingParams.top_p": [(lambda: read_sampling(top_p=NAN), "sampling.top_p")],
    "SamplingParams.min_p": [(lambda: read_sampling(min_p=NAN), "sampling.min_p")],
    "SamplingParams.repetition_penalty": [
        (lambda: read_sampling(repetition_penalty=NAN), "sampling.repetition_penalty")
    ],
    "SamplingParams.presence_penalty": [(lambda: read_sampling(presence_penalty=NAN), "sampling.presence_penalty")],
    "SamplingParams.frequency_penalty": [(lambda: read_sampling(frequency_penalty=NAN), "sampling.frequency_penalty")],
    "SamplingParams.logit_bias": [
        (lambda: read_sampling(logit_bias={3: NAN}), "sampling.logit_bias[3]"),
        (lambda: read_sampling(vocabulary=5000, logit_bias=BIASES), "sampling.logit_bias"),
        (lambda: read_sampling(logit_bias={VOCABULARY: 1.0}), f"sampling.logit_bias[{VOCABULARY}]"),
    ],
    "SamplingParams.max_new_tokens": [(lambda: read_sampling(max_new_tokens=0), "sampling.max_new_tokens")],
    "StopCriteria.stop_strings": [
        (lambda: read_stop(stop_strings=["x"] * 17), "stop.stop_strings"),
        (lambda: read_stop(stop_strings=["x", "y" * 257]), "stop.stop_strings[1]"),
        (lambda: read_stop(stop_strings=[""]), "stop.stop_strings[0]"),
    ],
    "StopCriteria.stop_token_ids": [
        (lambda: read_stop(stop_token_ids=[1] * 65), "stop.stop_token_ids"),
        (lambda: read_stop(stop_token_ids=[VOCABULARY]), "stop.stop_token_ids[0]"),
    ],
    "LogprobsOptions.top_n": [
        (lambda: read_turn(logprobs=common_pb2.LogprobsOptions(top_n=21)), "logprobs.top_n"),
    ],
    "SessionStart.committed_token_ids": [
        (lambda: wire.read_committed([1] * 60, 5, LIMITS, "committed"), "committed"),
        (lambda: wire.read_committed([VOCABULARY], 5, LIMITS, "committed"), "committed[0]"),
    ],
    "GenerateRequest.committed_token_ids": [
        (lambda: wire.read_committed([1] * 60, 5, LIMITS, "committed"), "committed"),
    ],
    "Block.token_ids": [
        (lambda: read_block(token_ids=[1] * 8), "block.token_ids"),
        (lambda: read_block(token_ids=[2**32 - 1]), "block.token_ids[0]"),
    ],
    "Block.more_steps": [
        (lambda: read_block(more_steps=8), "block.more_steps"),
        (lambda: read_block(more_steps=1, token_ids=[1]), "block.more_steps"),
        (lambda: read_block(more_steps=7, round=2**64 - 7), "block.more_steps"),
    ],
    "Block.draft_probs": [
        (lambda: read_block(draft_probs=[common_pb2.SparseDistribution()]), "block.draft_probs"),
    ],
    "SparseDistribution.token_ids": [
        (lambda: read_distribution(range(65), [1 / 65] * 65), "block.draft_probs[0].token_ids"),
        (lambda: read_distribution([5, VOCABULARY], [0.5, 0.5]), "block.draft_probs[0].token_ids[1]"),
    ],
    "SparseDistribution.probs": [(lambda: read_distribution([5], [NAN]), "block.draft_probs[0].probs")],
    "DetokenizeRequest.token_ids": [
        (lambda: wire.check_detokenizable([1] * 66, LIMITS), "token_ids"),
        (lambda: wire.check_detokenizable([VOCABULARY], LIMITS), "token_ids[0]"),
    ],
    "ExplainVerifyRequest.token_ids": [(lambda: read_explain(token_ids=[1] * 8), "token_ids")],
    "ExplainVerifyRequest.draft_probs": [
        (lambda: read_explain(draft_probs=[common_pb2.SparseDistribution()]), "draft_probs"),
    ],
    "ProposeStart.token_ids": [
        (lambda: read_draft_start(token_ids=[]), "start.token_ids"),
        (lambda: read_draft_start(token_ids=[1] * 131_073), "start.token_ids"),
        (lambda: read_draft_start(token_ids=[1, VOCABULARY]), "start.token_ids[1]"),
    ],
    "ProposeStart.proposer": [
        (lambda: open_proposer(99), "start.proposer"),
        (lambda: open_proposer(common_pb2.SOURCE_TARGET), "start.proposer"),
    ],
    "ProposeStart.session_id": [
        (lambda: read_draft_start(session_id="x" * 129), "start.session_id"),
        (lambda: read_draft_start(session_id="line\nbreak"), "start.session_id"),
    ],
    "ProposeStart.prompt_length": [(lambda: read_draft_start(prompt_length=2), "start.prompt_length")],
    "ProposeAsk.from_position": [
        (lambda: read_ask(from_position=6), "ask.from_position"),
        (lambda: read_ask(from_position=0), "ask.from_position"),
    ],
    "ProposeAsk.token_ids": [
        (lambda: read_ask(token_ids=[1] * 131_072), "ask.token_ids"),
        (lambda: read_ask(token_ids=[VOCABULARY]), "ask.token_ids[0]"),
    ],
    "ProposeAsk.max_tokens": [
        (lambda: read_ask(max_tokens=0), "ask.max_tokens"),
        (lambda: read_ask(max_tokens=65), "ask.max_tokens"),
    ],
    "ProposeAsk.proposals": [(lambda: read_ask(proposals=17), "ask.proposals")],
    "ProposeAsk.min_confidence": [
        (lambda: read_ask(min_confidence=NAN), "ask.min_confidence"),
        (lambda: read_ask(min_confidence=1.0), "ask.min_confidence"),
    ],
}
# By field: why any value will do.
FREE = {
    "SamplingParams.top_k": "more than the vocabulary keeps all",
    "SamplingParams.seed": "every pattern of 64 bits is a seed",
    "SamplingParams.min_new_tokens": "more than max_new_tokens suppresses the end until then",
    "Block.round": "sent back as it came",
    "Block.base_length": "compared with the session's; another one is stale",
    "Block.last_token_id": "compared with the session's; another one is stale",
    "Block.source": "not looked at",
    "ProposeAsk.round": "sent back as it came",
}


def fields_of(message: Descriptor, seen: set[str]) -> set[str]:
    """`Message.field` of everything but booleans and messages that are not repeated, at any depth."""
    found: set[str] = set()
    if message.name in seen:
        return found
    seen.add(message.name)
    for field in message.fields:
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if field.message_type is not None and not is_map:
            found |= fields_of(field.message_type, seen)
        if (field.message_type is None or field.is_repeated) and field.type != FieldDescriptor.TYPE_BOOL:
            found.add(f"{message.name}.{field.name}")
    return found


def request_fields() -> set[str]:
    """All of them that a client of either service can send."""
    seen: set[str] = set()
    services = [target_pb2.DESCRIPTOR.services_by_name["TargetService"]]
    services.append(draft_pb2.DESCRIPTOR.services_by_name["DraftService"])
    return set().union(*(fields_of(method.input_type, seen) for service in services for method in service.methods))


def test_no_field_is_forgotten():
    """The tables name every field of every request, and nothing else."""
    assert BOUNDED.keys().isdisjoint(FREE)
    assert request_fields() == BOUNDED.keys() | FREE.keys()


@pytest.mark.parametrize(
    ("read", "path"),
    [
        pytest.param(read, path, id=f"{name}-{number}")
        for name, cases in BOUNDED.items()
        for number, (read, path) in enumerate(cases)
    ],
)
def test_out_of_bounds_is_refused_by_name(read, path):
    """A value out of its bounds is refused under the path of its field, before any engine sees it."""
    with pytest.raises(InvalidRequestError) as refused:
        read()
    assert refused.value.field == path


@pytest.mark.parametrize("extreme", [0, 1, 2**32 - 1])
def test_free_fields_are_taken_at_their_extremes(extreme):
    """What has no bound is read at both ends of what its type holds."""
    read_sampling(top_k=extreme, min_new_tokens=extreme, seed=extreme << 32, max_new_tokens=max(extreme, 1))
    read_block(round=extreme << 32, base_length=extreme, last_token_id=extreme, source=min(extreme, 99))
    read_ask(round=extreme << 32)
