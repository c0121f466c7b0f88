"""Which failures of a target mean that it was lost, so that a session can go on with it later or with another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from specpair.errors import (
    CancelledError,
    InternalError,
    OverloadedError,
    ProtocolError,
    SpecpairError,
    UnavailableError,
)
from specpair.transports import CLOSED, STREAM_ENDED

__all__ = ["SESSION_ENDED", "TARGET_CHANGED", "is_lost"]

# Reasons of UnavailableError: the session is over on this side; all targets run something else than it began with.
SESSION_ENDED = "SESSION_ENDED"
TARGET_CHANGED = "TARGET_CHANGED"


@dataclass(frozen=True, slots=True)
class _Line:
    kind: type[SpecpairError]
    applies: Callable[[SpecpairError], bool]
    lost: bool
    why: str


def _always(error: SpecpairError) -> bool:
    return True


# The first line that applies decides. What no line is about, such as an invalid request, a deadline or missing
# credentials, would come out alike at every target.
_LINES = (
    _Line(SpecpairError, lambda e: e.retry_after == inf, False, "it asks not to be tried again"),
    _Line(UnavailableError, lambda e: e.reason in (CLOSED, SESSION_ENDED), False, "this side has ended the call"),
    _Line(UnavailableError, lambda e: e.reason == TARGET_CHANGED, False, "going on would change the output"),
    _Line(UnavailableError, _always, True, "it died, drains or starts, or the connection was refused, reset or closed"),
    _Line(CancelledError, _always, True, "a stopping server or a proxy: the caller's own cancellation is asyncio's"),
    _Line(InternalError, lambda e: bool(e.request_id), False, "the target's own answer, which it would give again"),
    _Line(InternalError, lambda e: e.reason in ("", "UNKNOWN"), True, "what proxies say when the target breaks off"),
    _Line(OverloadedError, lambda e: e.retry_after is not None, True, "full for now, and it says until when"),
    _Line(ProtocolError, lambda e: e.reason == STREAM_ENDED, True, "proxies end streams like this, targets never do"),
)


def is_lost(error: SpecpairError) -> bool:
    """Whether a failure of the stream to a target is one to go on after, at the same or another target."""
    return next((line.lost for line in _LINES if isinstance(error, line.kind) and line.applies(error)), False)
