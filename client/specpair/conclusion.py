"""The end of a generation, told once: a line in the log, and the end of its trace."""

from __future__ import annotations

import asyncio
import logging

from specpair.errors import SpecpairError, status_of
from specpair.request import Observer
from specpair.turn import Turn

__all__ = ["conclude"]

_log = logging.getLogger("specpair.generation")


def conclude(turn: Turn, error: BaseException | None) -> None:
    """Logs the turn's one line, at INFO, and ends its trace; `error` is what ended it, None where it was left.

    Counts, seconds and names only: no prompt, text or token, and no error's message, which may quote the request.
    """
    request, status = turn.request, _status(turn, error)
    if request.observer is not None:
        _count(turn, request.observer, status)
    if not (request.recording or _log.isEnabledFor(logging.INFO)):
        request.end(status, {})
        return
    stats = turn.stats
    fields = {
        "request_id": request.id,
        "status": status,
        "seconds": round(turn.meter.elapsed, 6),
        "time_to_first_token": round(stats.time_to_first_token, 6),
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "output_tokens": stats.output_tokens,
        "rounds": stats.rounds,
        "proposed": stats.proposed,
        "accepted": stats.accepted,
        "stale": stats.stale,
        "dropped": stats.dropped,
        "resumes": stats.resumes,
        "draft_losses": stats.draft_losses,
        "proposer": stats.proposer,
    }
    if turn.loop is not None and turn.loop.finish_reason is not None:
        fields["finish"] = turn.loop.finish_reason.value
    elif isinstance(error, SpecpairError) and error.reason:
        fields["reason"] = error.reason
    request.end(status, fields)
    if request.trace_id:
        fields["trace_id"] = request.trace_id
    _log.info(
        "generation %s: %s, %d tokens in %.3f s, %d rounds, %d of %d accepted",
        request.id,
        status,
        stats.output_tokens,
        fields["seconds"],
        stats.rounds,
        stats.accepted,
        stats.proposed,
        extra=fields,
    )


def _count(turn: Turn, observer: Observer, status: str) -> None:
    """Tells who counts, whose failure is not the generation's."""
    finish = turn.loop.finish_reason if turn.loop is not None else None
    try:
        observer.record(status, finish.value if finish is not None else "", turn.stats)
    except Exception:
        _log.exception("a generation was not counted", extra={"request_id": turn.request.id})


def _status(turn: Turn, error: BaseException | None) -> str:
    """A name of a gRPC status code, as the services log it."""
    if turn.ended:
        return "OK"
    if isinstance(error, SpecpairError):
        return status_of(error).name
    return "CANCELLED" if error is None or isinstance(error, asyncio.CancelledError | GeneratorExit) else "UNKNOWN"
