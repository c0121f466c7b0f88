"""What the calls of a generation have in common: the id that every log has, and a trace where somebody traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from specpair.errors import REQUEST_ID
from specpair.request_ids import request_id_of

if TYPE_CHECKING:
    from grpc import aio

    from specpair.pacing import Round
    from specpair.results import Stats

__all__ = ["Call", "Observer", "RequestContext", "observed"]


@dataclass(frozen=True)
class Call:
    """One call of a generation; `metadata` is what the service is told of it."""

    metadata: tuple[tuple[str, str], ...]

    def follow(self, call: aio.Call) -> None:
        """The call has been made: its end is noted, where anybody wants to know."""


class Observer(Protocol):
    """Counts generations, as `specpair.metrics.ClientMetrics` does."""

    def record(self, status: str, finish: str, stats: Stats) -> None:
        """A generation has ended, with the name of a gRPC status code and a finish reason, "" if it failed."""


class RequestContext:
    """A generation as logs and traces know it. This one is not traced: `specpair.tracing` has the other kind.

    Nothing that a prompt or an output says is ever told to it.
    """

    recording = False
    """Whether anybody wants to hear of events and rounds."""
    trace_id = ""
    """Under which a trace has the generation."""

    observer: Observer | None = None
    """Who counts the generation at its end."""

    def __init__(self, id: str = "") -> None:
        self.id = id or request_id_of()

    def begin(self) -> None:
        """The generation begins now, on behalf of whatever its caller is doing."""

    def call(self, method: str, address: str) -> Call:
        """A call that is about to be made, of a method such as "specpair.v1.TargetService/Verify"."""
        return Call(((REQUEST_ID, self.id),))

    def event(self, name: str, **attributes: str | int | float) -> None:
        """Something has happened."""

    def round(self, round: Round) -> None:
        """The target has judged a block."""

    def end(self, status: str, fields: dict[str, Any]) -> None:
        """The generation has ended, with the name of a gRPC status code and what its log line has."""


def observed(make: Callable[[str], RequestContext], observer: Observer | None) -> Callable[[str], RequestContext]:
    """`make`, with an observer for the contexts that it makes."""
    if observer is None:
        return make

    def made(id: str) -> RequestContext:
        context = make(id)
        context.observer = observer
        return context

    return made
