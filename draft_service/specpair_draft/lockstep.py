"""Continuous batching: whose chunk and whose step is next, and what one session's misfortune means to the others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import structlog
import torch

from specpair.errors import SpecpairError
from specpair_draft.asks import Ask, Deliver, Turn
from specpair_draft.sessions import Level, Session
from specpair_draft.steps import CATCH_UP, Decoder
from specpair_runtime.engine_metrics import EngineMetrics
from specpair_runtime.models.failures import fatal, non_finite, public

__all__ = ["Lockstep"]

# Steps of a run that nobody waits for. A device that works behind the host's back cannot be interrupted in less.
_BURST = 4


class Lockstep:
    """All sessions of a model, turn by turn; what the engine thread does, without the thread.

    A turn runs at most one chunk of prefill and one run of steps. Asked proposals go first; while a prompt waits they
    take turns with its chunks, one step for one chunk. Further proposals are made when neither waits, and guesses ahead
    of any ask when nothing else does. `interrupted` is asked after every step whether there is news: then the run ends,
    so that who comes joins at the next step.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        prefill_chunk: int,
        interrupted: Callable[[], bool] = lambda: False,
        metrics: EngineMetrics | None = None,
    ) -> None:
        self._decoder = decoder
        self._prefill_chunk = prefill_chunk
        self._interrupted = interrupted
        self._metrics = metrics or EngineMetrics()
        self._sessions: list[Session] = []
        self._prefills: deque[Session] = deque()
        self._log = structlog.get_logger("specpair.engine")

    def begin(self, session: Session, turn: Turn) -> None:
        """Starts a turn of a session, its first one or a later one."""
        if session not in self._sessions:
            self._sessions.append(session)
        session.begin(turn)
        self._queue_prefill(session)

    def take(self, session: Session, ask: Ask, deliver: Deliver, queued_ns: int) -> None:
        """Begins to answer an ask; at once, where everything is ready."""
        if session.failure is not None:
            deliver(session.failure)
            return
        session.take(ask, deliver, queued_ns)
        self._queue_prefill(session)
        session.settle()

    def close(self, session: Session) -> None:
        """Forgets a session; its slot may belong to another one already."""
        if session in self._sessions:
            self._sessions.remove(session)
        if session in self._prefills:
            self._prefills.remove(session)

    def refuse_all(self, error: SpecpairError) -> None:
        """Answers all that is asked with an error."""
        for session in self._sessions:
            session.fail(error)

    @torch.inference_mode()
    def turn(self) -> bool:
        """Computes for a while; False if there was nothing to do."""
        chunk = self._prefill_chunk_of_next()
        ready = [session for session in self._sessions if session not in self._prefills and not session.closed]
        levels = {session: session.level for session in ready}
        for level in Level if not chunk else (Level.ASKED,):
            sessions = [session for session in ready if levels[session] is level]
            if sessions:
                self._decode(sessions, level)
                return True
        return chunk

    def _queue_prefill(self, session: Session) -> None:
        if not session.path.fits or session.path.backlog <= CATCH_UP:
            session.prefill.stop()
        elif session not in self._prefills:
            session.prefill.start()
            self._prefills.append(session)

    def _prefill_chunk_of_next(self) -> bool:
        """One chunk for the session whose turn it is, until only what one step feeds is left."""
        if not self._prefills:
            return False
        session = self._prefills.popleft()
        if session.closed:
            return True
        path = session.path
        if path.fits and path.backlog > CATCH_UP:
            began = time.perf_counter_ns()
            chunk = path.tokens[path.fed : min(path.fed + self._prefill_chunk, len(path.tokens) - 1)]
            try:
                self._decoder.runner.prefill(session.slot, chunk, path.fed)
            except Exception as error:
                if fatal(error):
                    raise
                self._fail(session, error)
                return True
            path.feed(len(chunk))
            self._metrics.prefilled(len(chunk), (time.perf_counter_ns() - began) / 1e9)
            self._queue_prefill(session)
        return True

    def _decode(self, sessions: Sequence[Session], level: Level) -> None:
        """Lets sessions of one level guess on. Those that lack several ids catch up first, in a step of their own."""
        behind = [session for session in sessions if session.path.backlog > 1]
        if self._prefills or 0 < len(behind) < len(sessions):
            most = 1
        else:
            most = _BURST if level is not Level.ASKED else self._decoder.runner.max_length
        self._attempt(behind or sessions, most)

    def _attempt(self, sessions: Sequence[Session], most: int) -> None:
        """A run of at most so many steps. When it fails each session gets one of its own: none can fail the others."""
        began = time.perf_counter_ns()
        try:
            broken = self._run(sessions, most)
        except Exception as error:
            if fatal(error):
                raise
            if len(sessions) == 1:
                self._fail(sessions[0], error)
                return
            self._log.exception("step failed", sessions=len(sessions))
            for session in sessions:
                self._attempt([session], most)
            return
        spent = time.perf_counter_ns() - began
        self._metrics.stepped(len(sessions), spent / 1e9)
        for session in sessions:
            session.spend(spent)
            if not session.closed:
                session.settle()
        for session in broken:
            session.fail(non_finite())

    def _run(self, sessions: Sequence[Session], most: int) -> list[Session]:
        """Steps until a session is ready or there is news; returns the sessions whose logits were not finite."""
        run = self._decoder.run(sessions)
        for left in range(min(run.budget, most) - 1, -1, -1):
            run.step()
            if run.watched and left:
                if broken := run.read():
                    return broken
                if any(session.complete for session in sessions):
                    break
            if self._interrupted():
                break
        return run.read()

    def _fail(self, session: Session, error: Exception) -> None:
        self._log.error("the engine failed for a session", slot=session.slot, exc_info=error)
        session.fail(public(error))
