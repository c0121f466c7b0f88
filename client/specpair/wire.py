"""Plain data to protobuf messages and back: the only module that touches the generated messages.

What a field cannot hold, such as a negative number in an unsigned one, is an InvalidRequestError that names the field
as the target would: by its path from the request message.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from google.protobuf.message import Message

from specpair.errors import InvalidRequestError, ProtocolError
from specpair.messages import (
    Block,
    Committed,
    DraftAsk,
    DraftStart,
    DraftStarted,
    Fingerprint,
    ModelInfo,
    Phase,
    Proposal,
    SparseDistribution,
    Start,
    Started,
    Verdict,
)
from specpair.params import AcceptanceRule, Prompt, SamplingParams
from specpair.results import FinishReason, Logprobs, Source
from specpair.v1 import common_pb2, draft_pb2, target_pb2

__all__ = [
    "ask_request",
    "block_request",
    "detokenize_request",
    "draft_start_request",
    "fill_prompt",
    "generate_request",
    "generate_response",
    "model_info",
    "propose_response",
    "start_request",
    "tokenize_request",
    "verify_response",
]

_RULES = {
    AcceptanceRule.COUPLED: common_pb2.ACCEPTANCE_RULE_COUPLED,
    AcceptanceRule.REJECTION: common_pb2.ACCEPTANCE_RULE_REJECTION,
}
_SOURCES = {
    Source.TARGET: common_pb2.SOURCE_TARGET,
    Source.MODEL: common_pb2.SOURCE_MODEL,
    Source.NGRAM: common_pb2.SOURCE_NGRAM,
    Source.PREDICTION: common_pb2.SOURCE_PREDICTION,
}
_SOURCE_OF = {number: source for source, number in _SOURCES.items()}
_FINISH_REASON_OF = {
    common_pb2.FINISH_REASON_UNSPECIFIED: None,
    common_pb2.FINISH_REASON_STOP_TOKEN: FinishReason.STOP_TOKEN,
    common_pb2.FINISH_REASON_STOP_STRING: FinishReason.STOP_STRING,
    common_pb2.FINISH_REASON_MAX_NEW_TOKENS: FinishReason.MAX_NEW_TOKENS,
    common_pb2.FINISH_REASON_CACHE_FULL: FinishReason.CACHE_FULL,
}
_PHASE_OF = {
    common_pb2.PHASE_LOADING: Phase.LOADING,
    common_pb2.PHASE_COMPILING: Phase.COMPILING,
    common_pb2.PHASE_WARMING_UP: Phase.WARMING_UP,
    common_pb2.PHASE_READY: Phase.READY,
    common_pb2.PHASE_DRAINING: Phase.DRAINING,
    common_pb2.PHASE_FAILED: Phase.FAILED,
}
# What is the same on both sides, by name.
_SCALARS = {field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields} - {"rule", "logit_bias"}
_PLAIN_INFO = {field.name for field in fields(ModelInfo)} - {"phase", "fingerprint", "proposers"}


# --- requests to the target


def start_request(start: Start) -> target_pb2.VerifyRequest:
    """The first message of a Verify stream."""
    request = target_pb2.VerifyRequest()
    request.start.SetInParent()
    _fill_start(request.start, start, "start.")
    return request


def generate_request(start: Start) -> target_pb2.GenerateRequest:
    """The request of a Generate call."""
    request = target_pb2.GenerateRequest()
    _fill_start(request, start, "")
    return request


def block_request(block: Block) -> target_pb2.VerifyRequest:
    """A block of a Verify stream."""
    return target_pb2.VerifyRequest(
        block=target_pb2.Block(
            round=block.round,
            base_length=block.base_length,
            last_token_id=block.last_token_id,
            token_ids=block.token_ids,
            draft_probs=[
                common_pb2.SparseDistribution(token_ids=distribution.token_ids, probs=distribution.probs)
                for distribution in block.draft_probs
            ],
            source=_SOURCES[block.source],
        )
    )


def tokenize_request(prompt: Prompt) -> target_pb2.TokenizeRequest:
    """The request of a Tokenize call."""
    request = target_pb2.TokenizeRequest()
    fill_prompt(request.prompt, prompt, "prompt")
    return request


def detokenize_request(token_ids: Sequence[int], keep_special_tokens: bool) -> target_pb2.DetokenizeRequest:
    """The request of a Detokenize call."""
    request = target_pb2.DetokenizeRequest(keep_special_tokens=keep_special_tokens)
    _extend(request, "token_ids", token_ids, "")
    return request


# --- requests to the draft


def draft_start_request(start: DraftStart) -> draft_pb2.ProposeRequest:
    """The first message of a Propose stream."""
    request = draft_pb2.ProposeRequest()
    request.start.token_ids.extend(start.token_ids)
    _fill_sampling(request.start.sampling, start.params, "start.sampling.")
    if start.proposer is not None:
        request.start.proposer = _SOURCES[start.proposer]
    request.start.session_id = start.session_id
    return request


def ask_request(ask: DraftAsk) -> draft_pb2.ProposeRequest:
    """An ask of a Propose stream."""
    return draft_pb2.ProposeRequest(
        ask=draft_pb2.ProposeAsk(
            round=ask.round,
            from_position=ask.from_position,
            token_ids=ask.token_ids,
            max_tokens=ask.max_tokens,
        )
    )


# --- responses


def verify_response(response: target_pb2.VerifyResponse) -> Started | Verdict:
    """A message of a Verify stream. Raises ProtocolError for one without meaning."""
    match response.WhichOneof("message"):
        case "started":
            return _started(response.started)
        case "verdict":
            return _verdict(response.verdict)
    raise ProtocolError("the target sent an empty message")


def generate_response(response: target_pb2.GenerateResponse) -> Started | Committed:
    """A message of a Generate call. Raises ProtocolError for one without meaning."""
    match response.WhichOneof("message"):
        case "started":
            return _started(response.started)
        case "committed":
            return _committed(response.committed)
    raise ProtocolError("the target sent an empty message")


def propose_response(response: draft_pb2.ProposeResponse) -> DraftStarted | Proposal:
    """A message of a Propose stream. Raises ProtocolError for one without meaning."""
    match response.WhichOneof("message"):
        case "started":
            started = response.started
            return DraftStarted(proposer=_SOURCE_OF.get(started.proposer), max_length=started.max_length)
        case "proposal":
            proposal = response.proposal
            return Proposal(
                round=proposal.round,
                base_length=proposal.base_length,
                token_ids=tuple(proposal.token_ids),
                source=_SOURCE_OF.get(proposal.source, Source.MODEL),
                draft_probs=tuple(
                    SparseDistribution(tuple(distribution.token_ids), tuple(distribution.probs))
                    for distribution in proposal.draft_probs
                ),
                draft_us=proposal.draft_us,
            )
    raise ProtocolError("the draft sent an empty message")


def model_info(info: common_pb2.ModelInfo) -> ModelInfo:
    """What a service runs."""
    plain: dict[str, Any] = {name: getattr(info, name) for name in _PLAIN_INFO}
    return ModelInfo(
        phase=_PHASE_OF.get(info.phase, Phase.UNSPECIFIED),
        fingerprint=_fingerprint(info.fingerprint) if info.HasField("fingerprint") else None,
        proposers=tuple(_SOURCE_OF[number] for number in info.proposers if number in _SOURCE_OF),
        **plain,
    )


def _started(started: target_pb2.SessionStarted) -> Started:
    return Started(
        session_id=started.session_id,
        prompt_token_ids=tuple(started.prompt_token_ids),
        cached_tokens=started.cached_tokens,
        length=started.length,
        max_block_tokens=started.max_block_tokens,
        max_length=started.max_length,
    )


def _verdict(verdict: target_pb2.Verdict) -> Verdict:
    if verdict.status == target_pb2.Verdict.STATUS_UNSPECIFIED:
        raise ProtocolError(f"the verdict on round {verdict.round} has no status")
    return Verdict(
        round=verdict.round,
        stale=verdict.status == target_pb2.Verdict.STATUS_STALE,
        base_length=verdict.base_length,
        accepted=verdict.accepted,
        committed=_committed(verdict.committed),
        queue_us=verdict.queue_us,
        forward_us=verdict.forward_us,
    )


def _committed(committed: common_pb2.CommittedTokens) -> Committed:
    if committed.finish_reason not in _FINISH_REASON_OF:
        raise ProtocolError(f"unknown finish reason {committed.finish_reason}")
    return Committed(
        token_ids=tuple(committed.token_ids),
        text_delta=committed.text_delta,
        text_lengths=tuple(committed.text_lengths),
        logprobs=tuple(
            Logprobs(position.chosen.logprob, tuple((top.token_id, top.logprob) for top in position.top))
            for position in committed.logprobs
        ),
        finish_reason=_FINISH_REASON_OF[committed.finish_reason],
        stop_string=committed.stop_string,
    )


def _fingerprint(fingerprint: common_pb2.Fingerprint) -> Fingerprint:
    return Fingerprint(
        vocabulary_size=fingerprint.vocabulary_size,
        vocabulary_sha256=fingerprint.vocabulary_sha256,
        special_tokens_sha256=fingerprint.special_tokens_sha256,
        eos_token_ids=tuple(fingerprint.eos_token_ids),
        chat_template_sha256=fingerprint.chat_template_sha256,
    )


# --- what the caller gave, which may be anything


def _fill_start(message: target_pb2.SessionStart | target_pb2.GenerateRequest, start: Start, path: str) -> None:
    params = start.params
    fill_prompt(message.prompt, start.prompt, f"{path}prompt")
    _extend(message, "committed_token_ids", start.committed_token_ids, path)
    _fill_sampling(message.sampling, params, f"{path}sampling.")
    message.stop.SetInParent()
    _extend(message.stop, "stop_strings", params.stop, f"{path}stop.")
    _extend(message.stop, "stop_token_ids", params.stop_token_ids, f"{path}stop.")
    _set(message.stop, "ignore_eos", params.ignore_eos, f"{path}stop.")
    if params.logprobs is not None:
        message.logprobs.enabled = True
        _set(message.logprobs, "top_n", params.logprobs, f"{path}logprobs.")


def _fill_sampling(message: common_pb2.SamplingParams, params: SamplingParams, path: str) -> None:
    message.SetInParent()
    if params.rule is not None:
        try:
            message.rule = _RULES[AcceptanceRule(params.rule)]
        except ValueError:
            raise InvalidRequestError(f"must be one of {', '.join(AcceptanceRule)}", field=f"{path}rule") from None
    for field in _SCALARS:
        _set(message, field, getattr(params, field), path)
    for token_id, bias in (params.logit_bias or {}).items():
        try:
            message.logit_bias[token_id] = bias
        except (TypeError, ValueError) as refused:
            raise _unfit({token_id: bias}, f"{path}logit_bias[{token_id}]") from refused


def fill_prompt(message: common_pb2.Prompt, prompt: Prompt, path: str) -> None:
    """Text, token ids or chat messages. Raises InvalidRequestError for anything else."""
    if isinstance(prompt, str):
        _set(message, "text", prompt, f"{path}.")
        return
    try:
        parts = list(prompt)
    except TypeError:
        raise InvalidRequestError("must be text, token ids or chat messages", field=path) from None
    if any(isinstance(part, Mapping) for part in parts):
        for i, part in enumerate(parts):
            _fill_chat_message(message.chat.messages.add(), part, f"{path}.chat.messages[{i}]")
    else:
        message.token_ids.SetInParent()
        _extend(message.token_ids, "ids", parts, f"{path}.token_ids.")


def _fill_chat_message(message: common_pb2.ChatMessage, given: object, path: str) -> None:
    if not isinstance(given, Mapping) or set(given) != {"role", "content"}:
        raise InvalidRequestError("must have a role and a content and nothing else", field=path)
    _set(message, "role", given["role"], f"{path}.")
    _set(message, "content", given["content"], f"{path}.")


def _set(message: Message, field: str, value: object, path: str) -> None:
    if value is None:
        return
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as refused:
        raise _unfit(value, f"{path}{field}") from refused


def _extend(message: Message, field: str, values: Iterable[object], path: str) -> None:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InvalidRequestError("must be a sequence", field=f"{path}{field}")
    values = list(values)
    repeated = getattr(message, field)
    try:
        repeated.extend(values)  # one call for the usual case: prompts are long
        return
    except (TypeError, ValueError):
        message.ClearField(field)
    for i, value in enumerate(values):
        try:
            repeated.append(value)
        except (TypeError, ValueError) as refused:
            raise _unfit(value, f"{path}{field}[{i}]") from refused


def _unfit(value: object, path: str) -> InvalidRequestError:
    return InvalidRequestError(f"{reprlib.repr(value)} does not fit this field", field=path)
