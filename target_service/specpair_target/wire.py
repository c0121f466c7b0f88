"""Conversion between the target's messages and its types, with validation: bad input ends here, named by its field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from specpair.errors import InvalidRequestError, ProtocolError, UnsupportedError
from specpair.v1 import common_pb2, target_pb2
from specpair_runtime.sampling.logprobs import PositionLogprobs
from specpair_runtime.sampling.params import SamplingParams
from specpair_runtime.sampling.rejection import MAX_SUPPORT, SparseProbs
from specpair_runtime.wire import check_token_ids, read_sampling
from specpair_target.scheduler import Verification
from specpair_target.sessions import Commit, Session, TurnOptions

__all__ = [
    "Limits",
    "committed_message",
    "read_block",
    "read_committed",
    "read_draft_probs",
    "read_prompt",
    "read_turn",
    "stale",
    "verdict",
]

_MAX_STOP_STRINGS = 16
_MAX_STOP_LENGTH = 256
_MAX_STOP_IDS = 64
_MAX_TOP_LOGPROBS = 20
# Rounding of float32 probabilities that were normalised elsewhere.
_PROBS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Limits:
    """What requests are checked against. `block` is the most proposals in a block."""

    vocabulary: int
    max_length: int
    block: int
    eos_token_ids: frozenset[int]


def read_prompt(
    prompt: common_pb2.Prompt, tokenizer: PreTrainedTokenizerBase | None, limits: Limits, field: str
) -> list[int]:
    """Token ids of a prompt, at least one and at most `max_length`."""
    kind = prompt.WhichOneof("content")
    if kind is None:
        raise InvalidRequestError("must not be empty", field=field)
    if kind == "token_ids":
        ids = list(prompt.token_ids.ids)
        check_token_ids(ids, limits.vocabulary, f"{field}.token_ids.ids")
    elif tokenizer is None:
        raise InvalidRequestError("this model has no tokenizer; send token ids", field=f"{field}.{kind}")
    elif kind == "text":
        ids = list(tokenizer(prompt.text)["input_ids"])
    else:
        ids = _render_chat(prompt.chat, tokenizer, f"{field}.chat")
    if not ids:
        raise InvalidRequestError("must not be empty", field=f"{field}.{kind}")
    if len(ids) > limits.max_length:
        raise InvalidRequestError(
            f"{len(ids)} tokens are more than the {limits.max_length} positions of a slot", field=f"{field}.{kind}"
        )
    return ids


def _render_chat(chat: common_pb2.Chat, tokenizer: PreTrainedTokenizerBase, field: str) -> list[int]:
    if not tokenizer.chat_template:
        raise InvalidRequestError("this model has no chat template", field=field)
    if not chat.messages:
        raise InvalidRequestError("must not be empty", field=f"{field}.messages")
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    opening = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
    except Exception as error:  # templates raise what they like, for roles out of order for example
        raise InvalidRequestError(f"the chat template refuses it: {error}", field=f"{field}.messages") from error
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def read_committed(ids: Sequence[int], prompt_length: int, limits: Limits, field: str) -> list[int]:
    """Token ids that a broken session had committed; together with the prompt they fit the slot."""
    check_token_ids(ids, limits.vocabulary, field)
    if prompt_length + len(ids) > limits.max_length:
        raise InvalidRequestError(f"more than the {limits.max_length} positions of a slot", field=field)
    return list(ids)


def read_turn(
    request: target_pb2.SessionStart | target_pb2.GenerateRequest, limits: Limits, *, text: bool, prefix: str
) -> TurnOptions:
    """Sampling and stop criteria of a turn. `text` says whether the model has a tokenizer."""
    sampling, stop = request.sampling, request.stop
    max_new_tokens = sampling.max_new_tokens if sampling.HasField("max_new_tokens") else None
    if max_new_tokens == 0:
        raise InvalidRequestError("must be at least 1", field=f"{prefix}sampling.max_new_tokens")
    _check_stop(stop, limits, text, f"{prefix}stop")
    eos = frozenset() if stop.ignore_eos else limits.eos_token_ids
    return TurnOptions(
        sampling=read_sampling(sampling, limits.vocabulary, f"{prefix}sampling"),
        top_logprobs=_read_logprobs(request.logprobs, f"{prefix}logprobs"),
        max_new_tokens=max_new_tokens,
        stop_token_ids=eos | frozenset(stop.stop_token_ids),
        stop_strings=tuple(stop.stop_strings),
    )


def _read_logprobs(options: common_pb2.LogprobsOptions, field: str) -> int | None:
    if options.top_n > _MAX_TOP_LOGPROBS:
        raise InvalidRequestError(f"at most {_MAX_TOP_LOGPROBS}", field=f"{field}.top_n")
    return options.top_n if options.enabled or options.top_n else None


def _check_stop(stop: common_pb2.StopCriteria, limits: Limits, text: bool, field: str) -> None:
    if len(stop.stop_strings) > _MAX_STOP_STRINGS:
        raise InvalidRequestError(f"at most {_MAX_STOP_STRINGS}", field=f"{field}.stop_strings")
    if stop.stop_strings and not text:
        raise InvalidRequestError("this model has no tokenizer", field=f"{field}.stop_strings")
    for index, string in enumerate(stop.stop_strings):
        if not 1 <= len(string) <= _MAX_STOP_LENGTH:
            raise InvalidRequestError(
                f"must have 1 to {_MAX_STOP_LENGTH} characters", field=f"{field}.stop_strings[{index}]"
            )
    if len(stop.stop_token_ids) > _MAX_STOP_IDS:
        raise InvalidRequestError(f"at most {_MAX_STOP_IDS}", field=f"{field}.stop_token_ids")
    check_token_ids(stop.stop_token_ids, limits.vocabulary, f"{field}.stop_token_ids")


def read_block(request: target_pb2.VerifyRequest, limits: Limits) -> target_pb2.Block:
    """A checked block."""
    kind = request.WhichOneof("message")
    if kind == "extend":
        raise UnsupportedError("not available", field="extend")
    if kind != "block":
        raise ProtocolError(f"expected a block, got {kind or 'an empty message'}", field=kind or "message")
    block = request.block
    if len(block.token_ids) > limits.block:
        raise InvalidRequestError(
            f"{len(block.token_ids)} ids are more than a block's {limits.block}", field="block.token_ids"
        )
    check_token_ids(block.token_ids, limits.vocabulary, "block.token_ids")
    return block


def read_draft_probs(block: target_pb2.Block, sampling: SamplingParams, limits: Limits) -> list[SparseProbs]:
    """What the proposals of a block were sampled from; none for a proposer that is certain of them."""
    if not block.draft_probs:
        return []
    if not sampling.rejection:
        raise InvalidRequestError("only the rejection rule takes them", field="block.draft_probs")
    if len(block.draft_probs) != len(block.token_ids):
        raise InvalidRequestError("must have one entry for each of token_ids", field="block.draft_probs")
    return [
        _read_distribution(message, proposed, limits, f"block.draft_probs[{index}]")
        for index, (message, proposed) in enumerate(zip(block.draft_probs, block.token_ids, strict=True))
    ]


def _read_distribution(
    message: common_pb2.SparseDistribution, proposed: int, limits: Limits, field: str
) -> SparseProbs:
    ids, probs = list(message.token_ids), list(message.probs)
    if len(ids) != len(probs):
        raise InvalidRequestError("must be as long as token_ids", field=f"{field}.probs")
    if len(ids) > MAX_SUPPORT or len(set(ids)) != len(ids):
        raise InvalidRequestError(f"must be at most {MAX_SUPPORT} different ids", field=f"{field}.token_ids")
    check_token_ids(ids, limits.vocabulary, f"{field}.token_ids")
    if not all(0.0 <= prob <= 1.0 + _PROBS_TOLERANCE for prob in probs) or abs(sum(probs) - 1) > _PROBS_TOLERANCE:
        raise InvalidRequestError("must be probabilities that sum to 1", field=f"{field}.probs")
    if dict(zip(ids, probs, strict=True)).get(proposed, 0.0) <= 0.0:
        raise InvalidRequestError("gives the proposed id no probability", field=f"{field}.probs")
    return SparseProbs(ids, probs)


def committed_message(commit: Commit) -> common_pb2.CommittedTokens:
    """The message of committed tokens."""
    return common_pb2.CommittedTokens(
        token_ids=commit.token_ids,
        text_delta="".join(commit.texts),
        text_lengths=[len(text) for text in commit.texts],
        logprobs=[_position_logprobs(known) for known in commit.logprobs],
        finish_reason=commit.finish_reason,
        stop_string=commit.stop_string,
    )


def _position_logprobs(known: PositionLogprobs) -> common_pb2.PositionLogprobs:
    return common_pb2.PositionLogprobs(
        chosen=common_pb2.TokenLogprob(token_id=known.token_id, logprob=known.logprob),
        top=[common_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in known.top],
    )


def verdict(
    block: target_pb2.Block, base_length: int, verification: Verification, commit: Commit, slots_in_use: int
) -> target_pb2.VerifyResponse:
    """The answer to a block that was applied."""
    judgement = verification.judgement
    return target_pb2.VerifyResponse(
        verdict=target_pb2.Verdict(
            round=block.round,
            status=target_pb2.Verdict.STATUS_APPLIED,
            base_length=base_length,
            # What lies behind the end of the turn was judged and is no part of it.
            accepted=min(judgement.accepted, len(commit.token_ids)),
            committed=committed_message(commit),
            queue_us=verification.queue_us,
            forward_us=judgement.forward_us,
            batch_sessions=verification.batch_sessions,
            slots_in_use=slots_in_use,
        )
    )


def stale(block: target_pb2.Block, session: Session) -> target_pb2.VerifyResponse:
    """The answer to a block that does not continue the session."""
    return target_pb2.VerifyResponse(
        verdict=target_pb2.Verdict(
            round=block.round, status=target_pb2.Verdict.STATUS_STALE, base_length=session.length
        )
    )
