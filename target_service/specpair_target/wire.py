"""Conversion between the target's messages and its types, with validation: bad input ends here, named by its field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specpair.errors import InvalidRequestError
from specpair.v1 import common_pb2, target_pb2
from specpair_runtime.sampling.logprobs import PositionLogprobs
from specpair_runtime.sampling.params import SamplingParams
from specpair_runtime.sampling.rejection import MAX_SUPPORT, SparseProbs
from specpair_runtime.wire import check_token_ids, read_sampling
from specpair_target.blocks import Answer, Block, Stale
from specpair_target.explain import PositionExplanation
from specpair_target.prompts import Prompt, Prompts
from specpair_target.sessions import Commit, Session, TurnOptions

__all__ = [
    "Limits",
    "check_detokenizable",
    "check_proposal",
    "committed_message",
    "explanation",
    "read_blocks",
    "read_committed",
    "read_draft_probs",
    "read_prompt",
    "read_turn",
    "started",
    "verdict",
]

_MAX_STOP_STRINGS = 16
_MAX_STOP_LENGTH = 256
_MAX_STOP_IDS = 64
_MAX_TOP_LOGPROBS = 20
_MAX_MORE_STEPS = 7
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
    prompt: common_pb2.Prompt,
    prompts: Prompts,
    limits: Limits,
    field: str,
    after: Session | None = None,
    *,
    continuation: bool = False,
) -> Prompt:
    """The tokens that a turn begins with, at least one and at most `max_length`, those `after` a session's included; of
    a text as a `continuation` those that it would add to one."""
    kind = prompt.WhichOneof("content")
    if kind == "text":
        return prompts.of_text(prompt.text, f"{field}.text", after, continuation=continuation)
    if kind == "token_ids":
        if len(prompt.token_ids.ids) > limits.max_length:
            raise InvalidRequestError(
                f"more than the {limits.max_length} positions of a slot", field=f"{field}.token_ids"
            )
        check_token_ids(prompt.token_ids.ids, limits.vocabulary, f"{field}.token_ids.ids")
        return prompts.of_ids(prompt.token_ids.ids, f"{field}.token_ids", after)
    if kind == "chat":
        messages = [{"role": message.role, "content": message.content} for message in prompt.chat.messages]
        opening = prompt.chat.add_generation_prompt if prompt.chat.HasField("add_generation_prompt") else True
        return prompts.of_chat(messages, opening, f"{field}.chat", after)
    raise InvalidRequestError("must not be empty", field=field)


def read_committed(ids: Sequence[int], prompt_length: int, limits: Limits, field: str) -> list[int]:
    """Token ids that a broken session had committed; together with the prompt they fit the slot."""
    if prompt_length + len(ids) > limits.max_length:
        raise InvalidRequestError(f"more than the {limits.max_length} positions of a slot", field=field)
    check_token_ids(ids, limits.vocabulary, field)
    return list(ids)


def read_turn(
    request: target_pb2.SessionStart | target_pb2.SessionExtend | target_pb2.GenerateRequest,
    limits: Limits,
    *,
    text: bool,
    prefix: str,
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


def check_detokenizable(token_ids: Sequence[int], limits: Limits) -> None:
    """Raises InvalidRequestError for ids that are no text, or more than a session's.

    Tokenizers hold the interpreter while they decode: what is longer has to come in parts.
    """
    if len(token_ids) > limits.max_length + 1:
        raise InvalidRequestError(f"at most {limits.max_length + 1} ids", field="token_ids")
    check_token_ids(token_ids, limits.vocabulary, "token_ids")


def check_proposal(token_ids: Sequence[int], limits: Limits, field: str) -> None:
    """Raises InvalidRequestError for a proposal that cannot be verified."""
    if len(token_ids) > limits.block:
        raise InvalidRequestError(f"{len(token_ids)} ids are more than a block's {limits.block}", field=field)
    check_token_ids(token_ids, limits.vocabulary, field)


def read_blocks(message: target_pb2.Block, sampling: SamplingParams, limits: Limits) -> list[Block]:
    """A block of a session that samples in this way, and the plain steps behind it.

    Whether they continue the session is not asked here.
    """
    check_proposal(message.token_ids, limits, "block.token_ids")
    if message.more_steps > _MAX_MORE_STEPS:
        raise InvalidRequestError(f"at most {_MAX_MORE_STEPS}", field="block.more_steps")
    if message.more_steps and message.token_ids:
        raise InvalidRequestError("only behind a block that proposes nothing", field="block.more_steps")
    if message.round + message.more_steps >= 1 << 64:
        raise InvalidRequestError("there are no more rounds for them", field="block.more_steps")
    first = Block(
        token_ids=list(message.token_ids),
        base_length=message.base_length,
        last_token_id=message.last_token_id if message.HasField("last_token_id") else None,
        draft_probs=read_draft_probs(message, sampling, limits, "block."),
    )
    return [first, *(Block(base_length=message.base_length + 1 + i) for i in range(message.more_steps))]


def read_draft_probs(
    request: target_pb2.Block | target_pb2.ExplainVerifyRequest, sampling: SamplingParams, limits: Limits, prefix: str
) -> list[SparseProbs]:
    """What the proposals of a block were sampled from; none for a proposer that is certain of them."""
    field = f"{prefix}draft_probs"
    if not request.draft_probs:
        return []
    if not sampling.rejection:
        raise InvalidRequestError("only the rejection rule takes them", field=field)
    if len(request.draft_probs) != len(request.token_ids):
        raise InvalidRequestError("must have one entry for each of token_ids", field=field)
    return [
        _read_distribution(message, proposed, limits, f"{field}[{index}]")
        for index, (message, proposed) in enumerate(zip(request.draft_probs, request.token_ids, strict=True))
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


def started(session: Session, limits: Limits, from_position: int, identity: str) -> target_pb2.SessionStarted:
    """The answer to the start of a turn whose prompt begins at `from_position`."""
    return target_pb2.SessionStarted(
        session_id=session.id,
        prompt_token_ids=session.tokens[from_position : session.prompt_length],
        cached_tokens=from_position,
        length=session.length,
        max_block_tokens=limits.block,
        max_length=limits.max_length,
        identity=identity,
    )


def explanation(explained: PositionExplanation) -> target_pb2.PositionExplanation:
    """The message of an explanation."""
    return target_pb2.PositionExplanation(
        position=explained.position,
        proposed_token_id=explained.proposed,
        target_token_id=explained.target_token,
        target_prob=explained.target_prob,
        draft_prob=explained.draft_prob,
        top2_margin=explained.top2_margin,
        accepted=explained.accepted,
        reason=explained.reason,
    )


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


def verdict(round_: int, answer: Answer, slots_in_use: int) -> target_pb2.Verdict:
    """The answer to the block of a round."""
    if isinstance(answer, Stale):
        return target_pb2.Verdict(
            round=round_, status=target_pb2.Verdict.STATUS_STALE, base_length=answer.length, slots_in_use=slots_in_use
        )
    judgement, commit = answer.judgement, answer.commit
    return target_pb2.Verdict(
        round=round_,
        status=target_pb2.Verdict.STATUS_APPLIED,
        base_length=answer.base_length,
        # What lies behind the end of the turn was judged and is no part of it.
        accepted=min(judgement.accepted, len(commit.token_ids)),
        committed=committed_message(commit),
        queue_us=answer.queue_us,
        forward_us=judgement.forward_us,
        judge_us=judgement.judge_us,
        batch_sessions=answer.batch_sessions,
        slots_in_use=slots_in_use,
    )
