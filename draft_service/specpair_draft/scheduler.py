"""The engine thread: hands what is asked to the lockstep, and lets it compute as long as there is something to do."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import structlog

from specpair.errors import UnavailableError
from specpair_draft.asks import Ask, Deliver, Turn
from specpair_draft.lockstep import Lockstep
from specpair_draft.sessions import Session
from specpair_draft.steps import Decoder
from specpair_runtime.engine_metrics import EngineMetrics
from specpair_runtime.models.profiling import Profiler, Unprofiled

__all__ = ["Scheduler"]


class Scheduler:
    """One thread that owns the model. Everyone else talks to it through `begin`, `ask` and `close`."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        prefill_chunk: int,
        on_failure: Callable[[str], None] = lambda reason: None,
        profiler: Profiler | None = None,
        metrics: EngineMetrics | None = None,
    ) -> None:
        """`on_failure` is told why, should the thread itself fail: nothing is computed from then on."""
        self._on_failure = on_failure
        self._profiler = profiler or Unprofiled()
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._lockstep = Lockstep(
            decoder, prefill_chunk=prefill_chunk, interrupted=lambda: bool(self._inbox), metrics=metrics
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._log = structlog.get_logger("specpair.engine")

    def start(self) -> None:
        """Starts the engine thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stops the engine thread after its current run; what is asked still fails with UnavailableError."""
        with self._wake:
            self._stopping = True
            # Ends the run under way.
            self._inbox.append(lambda: None)
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._refuse_all()

    def begin(self, session: Session, turn: Turn) -> None:
        """Starts a session's turn; its prefill begins."""
        self._send(lambda: self._lockstep.begin(session, turn))

    def ask(self, session: Session, ask: Ask, deliver: Deliver) -> None:
        """Asks for proposals, which go to `deliver` in the engine thread, as may an error in place of the next one.

        Raises UnavailableError once the engine stops.
        """
        queued_ns = time.perf_counter_ns()
        self._send(lambda: self._lockstep.take(session, ask, deliver, queued_ns))

    def close(self, session: Session) -> None:
        """Forgets a session; its slot may be given to another one at once.

        A step under way may still write to the slot. That does no harm: a new session's own steps come after it.
        """
        session.closed = True
        with self._wake:
            self._inbox.append(lambda: self._lockstep.close(session))
            self._wake.notify()

    def _send(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._stopping:
                raise UnavailableError("the draft stops")
            self._inbox.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            busy = False
            while self._wait(busy):
                while self._inbox:
                    self._inbox.popleft()()
                with self._profiler.step("turn"):
                    busy = self._lockstep.turn()
        except Exception as error:
            self._log.exception("the engine thread failed")
            with self._wake:
                self._stopping = True
            # First this, so that nobody who is refused comes back to a service that calls itself healthy.
            self._on_failure(f"the engine failed: {type(error).__name__}")
            self._refuse_all()
        finally:
            self._profiler.close()

    def _wait(self, busy: bool) -> bool:
        """Waits for news, unless the engine is busy; whether to go on."""
        with self._wake:
            while not (busy or self._inbox or self._stopping):
                self._wake.wait()
            return not self._stopping

    def _refuse_all(self) -> None:
        """Answers everything, also what no turn has seen yet."""
        while self._inbox:
            self._inbox.popleft()()
        self._lockstep.refuse_all(UnavailableError("the draft stops"))
