"""Plain data to protobuf messages and back: the only module that touches the generated messages.

What a field cannot hold, such as a negative number in an unsigned one, is an InvalidRequestError that names the field
as the target would: by its path from the request message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from specpair.errors import InvalidRequestError, ProtocolError
from specpair.fields import extend_field, set_field, unfit
from specpair.messages import (
    Block,
    Committed,
    DraftAsk,
    DraftStart,
    DraftStarted,
    Explain,
    Extend,
    Fingerprint,
    ModelInfo,
    Phase,
    Proposal,
    SparseDistribution,
    Start,
    Started,
    Verdict,
)
from specpair.params import AcceptanceRule, ChatMessage, Prompt, SamplingParams
from specpair.results import FinishReason, Logprobs, PositionExplanation, Source
from specpair.v1 import common_pb2, draft_pb2, target_pb2

__all__ = [
    "detokenize_request",
    "explain_request",
    "explain_response",
    "generate_request",
    "generate_response",
    "model_info",
    "propose_request",
    "propose_response",
    "tokenize_request",
    "verify_request",
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
# gRPC's limit for a message is 4 MiB; the rest is for everything else in it.
_MOST_PROMPT_BYTES = 4 * 2**20 - 2**16
_SCALARS = {field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields} - {"rule", "logit_bias"}
_PLAIN_INFO = {field.name for field in fields(ModelInfo)} - {"phase", "fingerprint", "proposers"}


# --- requests to the target


def verify_request(message: Start | Extend | Block) -> target_pb2.VerifyRequest:
    """A message of a Verify stream."""
    request = target_pb2.VerifyRequest()
    match message:
        case Start():
            request.start.SetInParent()
            _fill_turn(request.start, message, "start.")
            extend_field(request.start, "committed_token_ids", message.committed_token_ids, "start.")
        case Extend():
            request.extend.SetInParent()
            _fill_turn(request.extend, message, "extend.")
        case Block():
            request.block.CopyFrom(_block(message))
    return request


def generate_request(start: Start) -> target_pb2.GenerateRequest:
    """The request of a Generate call."""
    request = target_pb2.GenerateRequest()
    _fill_turn(request, start, "")
    extend_field(request, "committed_token_ids", start.committed_token_ids, "")
    return request


def explain_request(question: Explain) -> target_pb2.ExplainVerifyRequest:
    """The request of an ExplainVerify call."""
    request = target_pb2.ExplainVerifyRequest(draft_probs=_distributions(question.draft_probs))
    _fill_prompt(request.prompt, question.prompt, "prompt")
    extend_field(request, "token_ids", question.token_ids, "")
    _fill_sampling(request.sampling, question.params, "sampling.")
    return request


def tokenize_request(prompt: Prompt, continuation: bool = False) -> target_pb2.TokenizeRequest:
    """The request of a Tokenize call."""
    request = target_pb2.TokenizeRequest(continuation=continuation)
    _fill_prompt(request.prompt, prompt, "prompt")
    return request


def detokenize_request(token_ids: Sequence[int], keep_special_tokens: bool) -> target_pb2.DetokenizeRequest:
    """The request of a Detokenize call."""
    request = target_pb2.DetokenizeRequest(keep_special_tokens=keep_special_tokens)
    extend_field(request, "token_ids", token_ids, "")
    return request


def _block(block: Block) -> target_pb2.Block:
    return target_pb2.Block(
        round=block.round,
        base_length=block.base_length,
        last_token_id=block.last_token_id,  # None leaves it out
        token_ids=block.token_ids,
        draft_probs=_distributions(block.draft_probs),
        source=_SOURCES[block.source],
        more_steps=block.more_steps,
    )


def _distributions(given: Iterable[SparseDistribution]) -> list[common_pb2.SparseDistribution]:
    return [common_pb2.SparseDistribution(token_ids=one.token_ids, probs=one.probs) for one in given]


# --- requests to the draft


def propose_request(message: DraftStart | DraftAsk) -> draft_pb2.ProposeRequest:
    """A message of a Propose stream."""
    match message:
        case DraftStart():
            return draft_pb2.ProposeRequest(start=_draft_start(message))
        case DraftAsk():
            ask = draft_pb2.ProposeAsk(
                round=message.round,
                from_position=message.from_position,
                token_ids=message.token_ids,
                max_tokens=message.max_tokens,
                proposals=message.proposals,
                min_confidence=message.min_confidence,
            )
            return draft_pb2.ProposeRequest(ask=ask)


def _draft_start(start: DraftStart) -> draft_pb2.ProposeStart:
    message = draft_pb2.ProposeStart(
        token_ids=start.token_ids,
        session_id=start.session_id,
        prompt_length=start.prompt_length,  # None leaves it out
    )
    _fill_sampling(message.sampling, start.params, "start.sampling.")
    if start.proposer is not None:
        message.proposer = _SOURCES[start.proposer]
    return message


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
            return replace(_committed(response.committed), base_length=response.base_length or None)
    raise ProtocolError("the target sent an empty message")


def propose_response(response: draft_pb2.ProposeResponse) -> DraftStarted | Proposal:
    """A message of a Propose stream. Raises ProtocolError for one without meaning."""
    match response.WhichOneof("message"):
        case "started":
            started = response.started
            return DraftStarted(
                proposer=_SOURCE_OF.get(started.proposer),
                max_length=started.max_length,
                fingerprint=_fingerprint(started.fingerprint) if started.HasField("fingerprint") else None,
            )
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
                confidence=tuple(proposal.confidence),
                index=proposal.index,
            )
    raise ProtocolError("the draft sent an empty message")


def explain_response(response: target_pb2.ExplainVerifyResponse) -> tuple[PositionExplanation, ...]:
    """What an ExplainVerify call answers."""
    return tuple(
        PositionExplanation(
            position=one.position,
            proposed_token_id=one.proposed_token_id if one.HasField("proposed_token_id") else None,
            target_token_id=one.target_token_id,
            target_prob=one.target_prob,
            draft_prob=one.draft_prob if one.HasField("draft_prob") else None,
            top2_margin=one.top2_margin,
            accepted=one.accepted,
            reason=one.reason,
        )
        for one in response.positions
    )


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
        identity=started.identity,
    )


def _verdict(verdict: target_pb2.Verdict) -> Verdict:
    if verdict.status not in (target_pb2.Verdict.STATUS_APPLIED, target_pb2.Verdict.STATUS_STALE):
        raise ProtocolError(f"the verdict on round {verdict.round} has no status that this client knows")
    return Verdict(
        round=verdict.round,
        stale=verdict.status == target_pb2.Verdict.STATUS_STALE,
        base_length=verdict.base_length,
        accepted=verdict.accepted,
        committed=_committed(verdict.committed),
        queue_us=verdict.queue_us,
        forward_us=verdict.forward_us,
        judge_us=verdict.judge_us,
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


def _fill_turn(
    message: target_pb2.SessionStart | target_pb2.SessionExtend | target_pb2.GenerateRequest,
    turn: Start | Extend,
    path: str,
) -> None:
    params = turn.params
    _fill_prompt(message.prompt, turn.prompt, f"{path}prompt")
    _fill_sampling(message.sampling, params, f"{path}sampling.")
    message.stop.SetInParent()
    extend_field(message.stop, "stop_strings", params.stop, f"{path}stop.")
    extend_field(message.stop, "stop_token_ids", params.stop_token_ids, f"{path}stop.")
    set_field(message.stop, "ignore_eos", params.ignore_eos, f"{path}stop.")
    if params.logprobs is not None:
        message.logprobs.enabled = True
        set_field(message.logprobs, "top_n", params.logprobs, f"{path}logprobs.")


def _fill_sampling(message: common_pb2.SamplingParams, params: SamplingParams, path: str) -> None:
    message.SetInParent()
    if params.rule is not None:
        try:
            message.rule = _RULES[AcceptanceRule(params.rule)]
        except ValueError:
            raise InvalidRequestError(f"must be one of {', '.join(AcceptanceRule)}", field=f"{path}rule") from None
    for field in _SCALARS:
        set_field(message, field, getattr(params, field), path)
    for token_id, bias in (params.logit_bias or {}).items():
        try:
            message.logit_bias[token_id] = bias
        except (TypeError, ValueError) as refused:
            raise unfit({token_id: bias}, f"{path}logit_bias[{token_id}]") from refused


def _fill_prompt(message: common_pb2.Prompt, prompt: Prompt, path: str) -> None:
    if isinstance(prompt, str):
        set_field(message, "text", prompt, f"{path}.")
    else:
        _fill_parts(message, prompt, path)
    if message.ByteSize() > _MOST_PROMPT_BYTES:
        raise InvalidRequestError(f"must be at most {_MOST_PROMPT_BYTES} bytes long", field=path)


def _fill_parts(message: common_pb2.Prompt, prompt: Sequence[int] | Sequence[ChatMessage], path: str) -> None:
    try:
        parts = None if isinstance(prompt, bytes | bytearray | memoryview) else list(prompt)
    except TypeError:
        parts = None
    if parts is None:
        raise InvalidRequestError("must be text, token ids or chat messages", field=path)
    if any(isinstance(part, Mapping) for part in parts):
        for i, part in enumerate(parts):
            _fill_chat_message(message.chat.messages.add(), part, f"{path}.chat.messages[{i}]")
    else:
        message.token_ids.SetInParent()
        extend_field(message.token_ids, "ids", parts, f"{path}.token_ids.")


def _fill_chat_message(message: common_pb2.ChatMessage, given: object, path: str) -> None:
    if not isinstance(given, Mapping) or set(given) != {"role", "content"}:
        raise InvalidRequestError("must have a role and a content and nothing else", field=path)
    set_field(message, "role", given["role"], f"{path}.")
    set_field(message, "content", given["content"], f"{path}.")
