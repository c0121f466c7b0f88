"""Conversion between the draft's messages and its types, with validation: bad input ends here, named by its field."""

from __future__ import annotations

from collections.abc import Sequence

from specpair.errors import InvalidRequestError, ProtocolError
from specpair.v1 import draft_pb2
from specpair_runtime.wire import check_token_ids

__all__ = ["check_ask", "check_start"]

_MAX_PROPOSAL = 64
# Ids that a session may name at once when no model bounds them.
_MAX_TOKENS = 1_048_576


def check_start(start: draft_pb2.ProposeStart, vocabulary: int | None) -> None:
    """Raises InvalidRequestError for token ids that no session can begin with. `vocabulary` None: any id will do."""
    if not start.token_ids:
        raise InvalidRequestError("must not be empty", field="start.token_ids")
    _check_ids(start.token_ids, vocabulary, "start.token_ids")


def check_ask(request: draft_pb2.ProposeRequest, length: int, vocabulary: int | None) -> draft_pb2.ProposeAsk:
    """A checked ask for a session of `length` tokens."""
    kind = request.WhichOneof("message")
    if kind != "ask":
        raise ProtocolError(f"expected an ask, got {kind or 'an empty message'}", field=kind or "message")
    ask = request.ask
    if not 1 <= ask.max_tokens <= _MAX_PROPOSAL:
        raise InvalidRequestError(f"must be between 1 and {_MAX_PROPOSAL}", field="ask.max_tokens")
    if ask.from_position > length:
        raise InvalidRequestError(f"is behind the session's {length} tokens", field="ask.from_position")
    if ask.from_position + len(ask.token_ids) == 0:
        raise InvalidRequestError("would leave no token", field="ask.from_position")
    _check_ids(ask.token_ids, vocabulary, "ask.token_ids")
    return ask


def _check_ids(ids: Sequence[int], vocabulary: int | None, field: str) -> None:
    if len(ids) > _MAX_TOKENS:
        raise InvalidRequestError(f"at most {_MAX_TOKENS} ids", field=field)
    if vocabulary is not None:
        check_token_ids(ids, vocabulary, field)
