"""Conversion between the draft's messages and its types, with validation: bad input ends here, named by its field."""

from __future__ import annotations

import re
from collections.abc import Sequence

from specpair.errors import InvalidRequestError, ProtocolError
from specpair.v1 import common_pb2, draft_pb2
from specpair_draft.asks import Ask, Timed, Turn
from specpair_runtime.wire import check_token_ids, read_sampling

__all__ = ["proposal_message", "read_ask", "read_turn"]

_MAX_PROPOSAL = 64
_MAX_PROPOSALS = 16
# Tokens of a session, where no slot bounds them.
_MAX_TOKENS = 131_072
# As long as any id that a target makes up.
_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{0,128}")


def read_turn(start: draft_pb2.ProposeStart, vocabulary: int | None) -> Turn:
    """A checked turn. `vocabulary` None: any id will do. Raises InvalidRequestError."""
    if not start.token_ids:
        raise InvalidRequestError("must not be empty", field="start.token_ids")
    _check_ids(start.token_ids, vocabulary, "start.token_ids")
    if not _SESSION_ID.fullmatch(start.session_id):
        raise InvalidRequestError("must be at most 128 letters, digits and . _ : -", field="start.session_id")
    prompt_length = start.prompt_length if start.HasField("prompt_length") else len(start.token_ids)
    if not 1 <= prompt_length <= len(start.token_ids):
        raise InvalidRequestError(f"must be between 1 and {len(start.token_ids)}", field="start.prompt_length")
    return Turn(list(start.token_ids), prompt_length, read_sampling(start.sampling, vocabulary, "start.sampling"))


def read_ask(request: draft_pb2.ProposeRequest, length: int, vocabulary: int | None) -> Ask:
    """A checked ask for a session of `length` tokens."""
    if request.WhichOneof("message") != "ask":
        raise ProtocolError("expected a start or an ask, got an empty message", field="message")
    ask = request.ask
    if not 1 <= ask.max_tokens <= _MAX_PROPOSAL:
        raise InvalidRequestError(f"must be between 1 and {_MAX_PROPOSAL}", field="ask.max_tokens")
    if ask.from_position > length:
        raise InvalidRequestError(f"is behind the session's {length} tokens", field="ask.from_position")
    if ask.from_position + len(ask.token_ids) == 0:
        raise InvalidRequestError("would leave no token", field="ask.from_position")
    if ask.from_position + len(ask.token_ids) > _MAX_TOKENS:
        raise InvalidRequestError(f"a session has at most {_MAX_TOKENS} tokens", field="ask.token_ids")
    _check_ids(ask.token_ids, vocabulary, "ask.token_ids")
    if ask.proposals > _MAX_PROPOSALS:
        raise InvalidRequestError(f"must be at most {_MAX_PROPOSALS}", field="ask.proposals")
    if not 0 <= ask.min_confidence < 1:
        raise InvalidRequestError("must be at least 0 and below 1", field="ask.min_confidence")
    return Ask(
        ask.from_position, list(ask.token_ids), ask.max_tokens, max(ask.proposals, 1), min_confidence=ask.min_confidence
    )


def proposal_message(round_: int, source: common_pb2.Source.ValueType, timed: Timed) -> draft_pb2.ProposeResponse:
    """One of the answers to an ask."""
    return draft_pb2.ProposeResponse(
        proposal=draft_pb2.Proposal(
            round=round_,
            index=timed.index,
            base_length=timed.base_length,
            token_ids=timed.proposal.token_ids,
            draft_probs=[
                common_pb2.SparseDistribution(token_ids=sampled.token_ids, probs=sampled.probs)
                for sampled in timed.proposal.draft_probs
            ],
            source=source,
            confidence=timed.proposal.confidence,
            queue_us=timed.queue_us,
            draft_us=timed.draft_us,
        )
    )


def _check_ids(ids: Sequence[int], vocabulary: int | None, field: str) -> None:
    if len(ids) > _MAX_TOKENS:
        raise InvalidRequestError(f"at most {_MAX_TOKENS} ids", field=field)
    if vocabulary is not None:
        check_token_ids(ids, vocabulary, field)
