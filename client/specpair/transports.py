"""How the client reaches the services: the few operations it needs, on plain data.

`grpc_transports` carries them out over gRPC; tests use in-memory fakes. Every operation raises an exception of
`specpair.errors`, and nothing else, when the other side or the way to it fails. `within` limits an operation, or a
stream from its opening to its end, to so many seconds; None does not limit it.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from specpair.messages import (
    Block,
    Committed,
    DraftAsk,
    DraftStart,
    DraftStarted,
    Explain,
    Extend,
    ModelInfo,
    Proposal,
    Start,
    Started,
    Verdict,
)
from specpair.params import Prompt
from specpair.results import PositionExplanation

__all__ = [
    "CLOSED",
    "STREAM_ENDED",
    "DraftTransport",
    "ProposeStream",
    "Receiver",
    "Stream",
    "TargetTransport",
    "VerifyStream",
]

# Reasons of errors: the other side ended a stream without a word; this side ended the call, or the client.
STREAM_ENDED = "STREAM_ENDED"
CLOSED = "CLOSED"

Received = TypeVar("Received", covariant=True)
Sent = TypeVar("Sent", contravariant=True)


class Receiver(Protocol[Received]):
    """The client's end of a call that answers with a stream."""

    async def receive(self) -> Received:
        """The next message. Raises ProtocolError with the reason STREAM_ENDED if the other side ended the stream.

        Whoever is cancelled while waiting loses no message: the next call waits on.
        """
        ...

    async def finish(self) -> None:
        """Nothing more will be sent: waits until the other side has ended the stream too."""
        ...

    def cancel(self) -> None:
        """Gives the call up at once, without waiting. From then on all else is UnavailableError, reason CLOSED."""
        ...


class Stream(Receiver[Received], Protocol[Sent, Received]):
    """The client's end of a call with a stream in both directions."""

    async def send(self, message: Sent) -> None:
        """Sends a message: all of it, also if the task is cancelled meanwhile."""
        ...


VerifyStream = Stream[Block | Extend, Started | Verdict]
ProposeStream = Stream[DraftAsk | DraftStart, DraftStarted | Proposal]


class TargetTransport(Protocol):
    """A target service."""

    async def info(self, within: float | None = None) -> ModelInfo: ...

    async def verify(self, start: Start, within: float | None = None) -> VerifyStream:
        """A new session; its first message will be `Started`."""
        ...

    async def generate(self, start: Start, within: float | None = None) -> Receiver[Started | Committed]:
        """The target's own loop; its first message will be `Started`."""
        ...

    async def explain(self, question: Explain, within: float | None = None) -> tuple[PositionExplanation, ...]: ...

    async def tokenize(
        self, prompt: Prompt, within: float | None = None, *, continuation: bool = False
    ) -> tuple[int, ...]:
        """Token ids of a prompt; as a `continuation`, those of a text in a session's later turn."""
        ...

    async def detokenize(
        self, token_ids: tuple[int, ...], keep_special_tokens: bool, within: float | None = None
    ) -> str: ...

    async def healthy(self, within: float | None = None) -> bool: ...

    async def close(self) -> None: ...


class DraftTransport(Protocol):
    """A draft service."""

    async def info(self, within: float | None = None) -> ModelInfo: ...

    async def propose(self, start: DraftStart, within: float | None = None) -> ProposeStream:
        """A new session; its first message will be `DraftStarted`."""
        ...

    async def healthy(self, within: float | None = None) -> bool: ...

    async def close(self) -> None: ...
