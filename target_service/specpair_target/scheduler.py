"""The engine thread: takes what waits, packs it into steps, runs them, commits, answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import structlog

from specpair.errors import UnavailableError
from specpair_runtime.engine_metrics import EngineMetrics
from specpair_runtime.models.failures import fatal, non_finite, public
from specpair_runtime.models.profiling import Profiler, Unprofiled
from specpair_target.blocks import Answer, Block, Verification
from specpair_target.gathering import Gathering
from specpair_target.lanes import Lane, Waiting, oldest
from specpair_target.prefills import Prefills, StepBudget
from specpair_target.rows import RowMaker
from specpair_target.sessions import Commit, Session
from specpair_target.verifier import Judgement, Row, Verifier

__all__ = ["Scheduler"]

# A group of sessions that step together, and the length that they attend to.
_Group = tuple[list[Lane], int]
_Said = tuple[Judgement, Commit, int]


class Scheduler:
    """One thread that owns the model. Everyone else talks to it through `prefill`, `submit` and `close`.

    A turn of the loop runs one step or one chunk of prefill, and looks at what has come meanwhile: new sessions join
    the next step. Of sessions that attend to different lengths those step next who have waited longest. The chunks of
    a long prompt and the steps of running sessions share the engine by a budget of rows, so that neither starves.

    A session's blocks are applied in order. The verdict on one is committed in this thread, and the next one that
    continues it, if it is there already, is part of the very next step. A resumed session first replays its committed
    tokens in blocks of the verify width, through the very steps that computed them before.
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        prefill_chunk: int,
        step_tokens: int | None = None,
        gather: bool = False,
        on_failure: Callable[[str], None] = lambda reason: None,
        profiler: Profiler | None = None,
        metrics: EngineMetrics | None = None,
    ) -> None:
        """`step_tokens` are rows of prefill and steps between two looks at the queue, by default a chunk and one
        session's rows; `gather` lets steps wait for company. `on_failure` is told why, should the thread itself fail:
        nothing is computed from then on.
        """
        self._verifier = verifier
        self._on_failure = on_failure
        self._profiler = profiler or Unprofiled()
        self._metrics = metrics or EngineMetrics()
        self._runner = verifier.runner
        self._rows = RowMaker(verifier)
        self._lanes: dict[Session, Lane] = {}
        self._prefills = Prefills(prefill_chunk)
        self._budget = StepBudget(step_tokens or prefill_chunk + verifier.width, prefill_chunk)
        self._gathering = Gathering() if gather else None
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._log = structlog.get_logger("specpair.engine")

    def start(self) -> None:
        """Starts the engine thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stops the engine thread after its current step; what still waits fails with UnavailableError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._refuse_all()

    def prefill(self, session: Session) -> None:
        """Begins to prefill a session's prompt, at its first turn or a later one. No block of it may be waiting.

        Raises UnavailableError when the engine stops.
        """
        with self._wake:
            if self._stopping:
                raise UnavailableError("the target stops")
            self._lane(session).rest()
            self._prefills.add(session)
            if not session.prefilled:
                session.prefill.start()
            self._wake.notify()

    def submit(self, session: Session, block: Block) -> Future[Answer]:
        """Queues a block behind the session's others. Raises UnavailableError when the engine stops."""
        answer: Future[Answer] = Future()
        with self._wake:
            if self._stopping:
                raise UnavailableError("the target stops")
            self._lane(session).push(Waiting(block, answer))
            self._wake.notify()
        return answer

    def close(self, session: Session) -> None:
        """Forgets a session, with the blocks that wait; its slot may be given to another one at once.

        A step under way may still write to the slot. That does no harm: a new session's own steps come after it.
        """
        with self._wake:
            session.closed = True
            self._wake.notify()

    def _lane(self, session: Session) -> Lane:
        return self._lanes.setdefault(session, Lane(session))

    def _run(self) -> None:
        try:
            while (work := self._next()) is not None:
                if isinstance(work, Session):
                    with self._profiler.step("prefill"):
                        self._prefill_chunk(work)
                else:
                    with self._profiler.step("verify"):
                        self._step(*work)
        except Exception as error:
            self._log.exception("the engine thread failed")
            with self._wake:
                self._stopping = True
            # First this, so that nobody who is refused comes back to a service that calls itself healthy.
            self._on_failure(f"the engine failed: {type(error).__name__}")
            self._refuse_all()
        finally:
            self._profiler.close()

    def _refuse_all(self) -> None:
        with self._wake:
            lanes = list(self._lanes.values())
        for lane in lanes:
            while lane.blocks:
                lane.blocks.popleft().reply(UnavailableError("the target stops"))

    def _next(self) -> Session | _Group | None:
        """Waits for work: a session whose prompt gets a chunk now, or a group that steps; None to stop."""
        with self._wake:
            while not self._stopping:
                ready = self._settle()
                prompt = self._prefills.first()
                if prompt is None:
                    self._budget.reset()
                elif self._budget.allows_chunk:
                    return prompt
                group = self._group(ready) if ready else None
                wait_ns = self._wait_ns(ready, group) if group or prompt else 0
                if not wait_ns and (group or prompt):
                    return group or prompt
                self._wake.wait(wait_ns / 1e9 if wait_ns else None)
        return None

    def _settle(self) -> list[Lane]:
        """The lanes that can be part of a step now. Answers what cannot be applied; forgets closed sessions."""
        ready = [lane for lane in self._lanes.values() if lane.settle()]
        for session in [session for session in self._lanes if session.closed]:
            del self._lanes[session]
        return ready

    def _group(self, ready: list[Lane]) -> _Group:
        """Who steps next, of those that are ready."""
        length = self._length(oldest(ready))
        return [lane for lane in ready if self._length(lane) == length], length

    def _wait_ns(self, ready: list[Lane], group: _Group | None) -> int:
        """Nanoseconds to wait for more company. Nobody waits beside another group that could step."""
        if self._gathering is None or len(self._lanes) == 1 or (group is not None and len(group[0]) < len(ready)):
            return 0
        company = [lane for lane in self._lanes.values() if group is None or self._length(lane) == group[1]]
        away = [lane for lane in company if lane.away]
        return self._gathering.wait_ns(away, ready, time.perf_counter_ns())

    def _length(self, lane: Lane) -> int:
        """What the lane's next step attends to."""
        return self._runner.bucket(lane.session.kv_length)

    def _prefill_chunk(self, session: Session) -> None:
        """The next chunk of a prompt."""
        began_ns = time.perf_counter_ns()
        end = min(session.kv_length + self._prefills.chunk, session.prompt_length - 1)
        try:
            self._runner.prefill(session.slot, session.tokens[session.kv_length : end], session.kv_length)
        except Exception as error:
            if fatal(error):
                raise
            self._log.exception("prefill failed", session_id=session.id)
            session.failure = public(error)
            return
        self._metrics.prefilled(end - session.kv_length, (time.perf_counter_ns() - began_ns) / 1e9)
        session.kv_length = end
        if session.prefilled:
            session.prefill.stop()
        self._prefills.computed()
        self._budget.spend()

    def _step(self, group: list[Lane], length: int) -> None:
        """One forward pass for a group: judges blocks, and replays where a session has not caught up.

        When it fails, each session gets a pass of its own, so that one of them cannot fail the others.
        """
        began_ns = time.perf_counter_ns()
        slots = self._runner.slot_range([lane.session.slot for lane in group])
        rows = [Row(self._runner.parking, [0]) for _ in slots]
        try:
            for lane in group:
                rows[lane.session.slot - slots.start] = self._rows.of(lane, length)
            judgements = self._verifier.verify(slots.start, rows, length)
        except Exception as error:
            if fatal(error):
                raise
            self._log.exception("step failed", sessions=len(group))
            if len(group) == 1:
                group[0].session.failure = public(error)
            else:
                for lane in group:
                    self._step([lane], length)
            return
        answers = [
            self._conclude(lane, rows[lane.session.slot - slots.start], judgements[lane.session.slot - slots.start])
            for lane in group
        ]
        self._budget.stepped(len(slots) * self._verifier.width)
        if self._gathering is not None:
            self._gathering.stepped(len(slots), began_ns, time.perf_counter_ns())
        # All at once: whoever is woken competes with this thread for the interpreter.
        for waiting, said in filter(None, answers):
            queue_us = (began_ns - waiting.queued_ns) // 1000
            waiting.reply(Verification(*said, queue_us=queue_us, batch_sessions=len(group)))
        self._metrics.stepped(len(group), (time.perf_counter_ns() - began_ns) / 1e9)

    def _conclude(self, lane: Lane, row: Row, judgement: Judgement) -> tuple[Waiting, _Said] | None:
        """Commits what was said to a session's first block; returns the block and what to answer, if there is one."""
        session = lane.session
        lane.ready_ns = None
        if session.closed:
            return None
        if not session.caught_up and judgement.finite:
            session.kv_length += len(row.token_ids)
        elif not judgement.finite and session.caught_up and len(row.token_ids) > 1:
            # Whether the target alone would have failed must not depend on what was proposed.
            lane.blocks[0] = replace(lane.blocks[0], block=Block())
        elif not judgement.finite:
            session.failure = non_finite()
        else:
            return self._commit(lane, judgement)
        return None

    def _commit(self, lane: Lane, judgement: Judgement) -> tuple[Waiting, _Said] | None:
        session = lane.session
        # The KV of the accepted tokens is in the slot from now on, before another step can touch it.
        session.kv_length += judgement.accepted + 1
        base_length = session.length
        try:
            commit = session.commit(judgement.token_ids, judgement.logprobs)
        except Exception as error:  # tokenizers are not ours
            self._log.exception("commit failed", session_id=session.id)
            session.failure = public(error)
            return None
        with self._wake:
            return lane.answered(), (judgement, commit, base_length)
