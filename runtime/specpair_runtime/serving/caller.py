"""Who makes a call, and how long it waits for the answer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import grpc

from specpair_runtime.serving.identity import current_identity

__all__ = ["Caller"]


@dataclass(frozen=True)
class Caller:
    """A call's `identity`, and its `deadline` by `time.monotonic`; None is a caller that waits for ever."""

    identity: str = ""
    deadline: float | None = None

    @classmethod
    def of(cls, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        """The caller of the current call."""
        remaining = context.time_remaining()
        return cls(current_identity(), None if remaining is None else time.monotonic() + remaining)
