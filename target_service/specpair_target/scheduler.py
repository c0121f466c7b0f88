"""The engine thread: takes what waits, packs it into steps, runs them, answers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import structlog
import torch

from specpair.errors import InternalError, OverloadedError, SpecpairError, UnavailableError
from specpair_runtime.sampling.history import TokenHistory
from specpair_runtime.sampling.rejection import SparseProbs
from specpair_target.sessions import Session
from specpair_target.verifier import Judgement, Row, Verifier

__all__ = ["Scheduler", "Verification"]


@dataclass(frozen=True)
class Verification:
    """A judgement with the circumstances of its step."""

    judgement: Judgement
    queue_us: int
    batch_sessions: int


@dataclass(frozen=True)
class _Work:
    session: Session
    proposal: Sequence[int]
    draft_probs: Sequence[SparseProbs]
    answer: Future[Verification]
    queued_ns: int = field(default_factory=time.perf_counter_ns)


class Scheduler:
    """One thread that owns the model. Everyone else talks to it through `prefill`, `submit` and `close`.

    A turn of the loop runs at most one chunk of prefill and then one step for every session that is ready, so a long
    prompt and the running sessions take turns. A resumed session first replays its committed tokens in blocks of the
    verify width, through the very steps that computed them before.
    """

    def __init__(
        self, verifier: Verifier, *, prefill_chunk: int, on_failure: Callable[[str], None] = lambda reason: None
    ) -> None:
        """`on_failure` is told why, should the thread itself fail: nothing is computed from then on."""
        self._verifier = verifier
        self._on_failure = on_failure
        self._runner = verifier.runner
        self._prefill_chunk = prefill_chunk
        self._prefills: deque[Session] = deque()
        self._work: deque[_Work] = deque()
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
        """Begins to prefill a session's prompt, at its first turn or a later one."""
        with self._wake:
            self._prefills.append(session)
            self._wake.notify()

    def submit(
        self, session: Session, proposal: Sequence[int], draft_probs: Sequence[SparseProbs] = ()
    ) -> Future[Verification]:
        """Queues a block of at most width - 1 proposals; a session has one block in the queue at a time."""
        work = _Work(session, proposal, draft_probs, Future())
        with self._wake:
            if self._stopping:
                raise UnavailableError("the target stops")
            self._work.append(work)
            self._wake.notify()
        return work.answer

    def close(self, session: Session) -> None:
        """Forgets a session; its slot may be given to another one at once.

        A step under way may still write to the slot. That does no harm: a new session's own steps come after it.
        """
        with self._wake:
            session.closed = True

    def _run(self) -> None:
        try:
            while self._wait():
                self._prefill_chunk_of_next()
                for length, group in self._take_ready().items():
                    self._step(group, length)
        except Exception as error:
            self._log.exception("the engine thread failed")
            with self._wake:
                self._stopping = True
            self._refuse_all()
            self._on_failure(f"the engine failed: {type(error).__name__}")

    def _refuse_all(self) -> None:
        while self._work:
            _answer(self._work.popleft(), UnavailableError("the target stops"))

    def _wait(self) -> bool:
        with self._wake:
            while not (self._prefills or self._work or self._stopping):
                self._wake.wait()
            return not self._stopping

    def _prefill_chunk_of_next(self) -> None:
        """One chunk for the session whose turn it is. The prompt alone decides the chunks: a rerun repeats the bits."""
        with self._wake:
            session = self._prefills.popleft() if self._prefills else None
        if session is None or session.closed or session.prefilled:
            return
        end = min(session.kv_length + self._prefill_chunk, session.prompt_length - 1)
        try:
            self._runner.prefill(session.slot, session.tokens[session.kv_length : end], session.kv_length)
        except Exception as error:
            self._log.exception("prefill failed", session_id=session.id)
            session.failure = _public(error)
            return
        session.kv_length = end
        if not session.prefilled:
            with self._wake:
                self._prefills.append(session)

    def _take_ready(self) -> dict[int, list[_Work]]:
        """Takes the blocks whose sessions are prefilled, by the length that their step attends to."""
        ready: dict[int, list[_Work]] = {}
        waiting: deque[_Work] = deque()
        with self._wake:
            for work in self._work:
                session = work.session
                if session.closed:
                    work.answer.cancel()
                elif session.failure is not None:
                    _answer(work, session.failure)
                elif session.prefilled:
                    ready.setdefault(self._runner.bucket(session.kv_length), []).append(work)
                else:
                    waiting.append(work)
            self._work = waiting
        return ready

    def _step(self, group: list[_Work], length: int) -> None:
        """One forward pass for a group: judges blocks, and replays where a session has not caught up.

        When it fails, each session gets a pass of its own, so that one of them cannot fail the others.
        """
        began = time.perf_counter_ns()
        slots = self._runner.slot_range([work.session.slot for work in group])
        rows = [Row(self._runner.parking, [0]) for _ in slots]
        try:
            for work in group:
                rows[work.session.slot - slots.start] = self._row(work, length)
            judgements = self._verifier.verify(slots.start, rows, length)
        except Exception as error:
            self._log.exception("step failed", sessions=len(group))
            if len(group) == 1:
                _answer(group[0], _public(error))
            else:
                for work in group:
                    self._step([work], length)
            return
        for work in group:
            judgement = judgements[work.session.slot - slots.start]
            queue_us = (began - work.queued_ns) // 1000
            self._conclude(work, length, Verification(judgement, queue_us, len(group)))

    def _row(self, work: _Work, length: int) -> Row:
        """The session's next tokens: proposals to judge, or committed ones to replay.

        Nothing is judged at or behind position `length`, which belongs to the next bucket: every position is judged
        with the attended length of its own bucket, whichever block it comes in. A proposal across that border loses
        its tail.
        """
        session = work.session
        if session.caught_up:
            token_ids = [session.tokens[-1], *work.proposal][: length - session.kv_length]
            return Row(
                start=session.kv_length,
                token_ids=token_ids,
                params=session.options.sampling,
                history=self._history(session),
                draft_probs=work.draft_probs[: len(token_ids) - 1],
                top_logprobs=session.options.top_logprobs,
                traced=session.options.traced,
            )
        return Row(session.kv_length, session.tokens[session.kv_length : self._replay_end(session, length)])

    def _history(self, session: Session) -> TokenHistory | None:
        if not session.options.sampling.needs_history:
            return None
        if session.history is None:
            session.history = TokenHistory(
                session.options.sampling,
                session.tokens[: session.prompt_length],
                session.options.stop_token_ids,
                self._runner.vocabulary,
                self._runner.device,
            )
        session.history.extend(session.tokens[session.history.length :])
        return session.history

    def _replay_end(self, session: Session, length: int) -> int:
        return min(session.kv_length + self._verifier.width, len(session.tokens) - 1, length)

    def _conclude(self, work: _Work, length: int, verification: Verification) -> None:
        session, judgement = work.session, verification.judgement
        if not judgement.finite and session.caught_up and work.proposal:
            # Whether the target alone would have failed must not depend on what was proposed.
            with self._wake:
                self._work.append(replace(work, proposal=(), draft_probs=()))
        elif not judgement.finite:
            _answer(work, InternalError("the model's logits are not finite", reason="NON_FINITE_LOGITS"))
        elif session.caught_up:
            # The KV of the accepted tokens is in the slot from now on, before another step can touch it.
            session.kv_length += judgement.accepted + 1
            _answer(work, verification)
        else:
            session.kv_length = self._replay_end(session, length)
            with self._wake:
                self._work.append(work)


def _answer(work: _Work, outcome: Verification | SpecpairError) -> None:
    """Answers a block, unless its session went away in the meantime."""
    if not work.answer.set_running_or_notify_cancel():
        return
    if isinstance(outcome, SpecpairError):
        work.answer.set_exception(outcome)
    else:
        work.answer.set_result(outcome)


def _public(error: Exception) -> SpecpairError:
    """What a client may know of an engine's failure; the log has the rest."""
    if isinstance(error, torch.OutOfMemoryError):
        return OverloadedError("the device is out of memory", reason="OUT_OF_MEMORY")
    return InternalError("the engine failed", reason="ENGINE_FAILED")
