"""Conversion between the draft's messages and its types, with validation: bad input ends here, named by its field."""

from __future__ import annotations

from collections.abc import Sequence

from specpair.errors import InvalidRequestError, ProtocolError
from specpair.v1 import common_pb2, draft_pb2
from specpair_draft.engine import Timed
from specpair_draft.proposers import Proposer, Turn
from specpair_runtime.wire import check_token_ids, read_sampling

__all__ = ["check_ask", "proposal_message", "read_turn"]

_MAX_PROPOSAL = 64
# Ids that a session may name at once when no model bounds them.
_MAX_TOKENS = 1_048_576


def read_turn(start: draft_pb2.ProposeStart, vocabulary: int | None) -> Turn:
    """A checked turn. `vocabulary` None: any id will do. Raises InvalidRequestError."""
    if not start.token_ids:
        raise InvalidRequestError("must not be empty", field="start.token_ids")
    _check_ids(start.token_ids, vocabulary, "start.token_ids")
    prompt_length = start.prompt_length if start.HasField("prompt_length") else len(start.token_ids)
    if not 1 <= prompt_length <= len(start.token_ids):
        raise InvalidRequestError(f"must be between 1 and {len(start.token_ids)}", field="start.prompt_length")
    return Turn(start.token_ids, prompt_length, read_sampling(start.sampling, vocabulary, "start.sampling"))


def check_ask(request: draft_pb2.ProposeRequest, length: int, vocabulary: int | None) -> draft_pb2.ProposeAsk:
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
    _check_ids(ask.token_ids, vocabulary, "ask.token_ids")
    return ask


def proposal_message(ask: draft_pb2.ProposeAsk, proposer: Proposer, timed: Timed) -> draft_pb2.ProposeResponse:
    """The answer to an ask."""
    return draft_pb2.ProposeResponse(
        proposal=draft_pb2.Proposal(
            round=ask.round,
            base_length=proposer.length,
            token_ids=timed.proposal.token_ids,
            draft_probs=[
                common_pb2.SparseDistribution(token_ids=sampled.token_ids, probs=sampled.probs)
                for sampled in timed.proposal.draft_probs
            ],
            source=proposer.source,
            queue_us=timed.queue_us,
            draft_us=timed.draft_us,
        )
    )


def _check_ids(ids: Sequence[int], vocabulary: int | None, field: str) -> None:
    if len(ids) > _MAX_TOKENS:
        raise InvalidRequestError(f"at most {_MAX_TOKENS} ids", field=field)
    if vocabulary is not None:
        check_token_ids(ids, vocabulary, field)
