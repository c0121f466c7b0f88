"""The blocks that wait, session by session, and when a session that was answered will be back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from specpair.errors import SpecpairError
from specpair_target.blocks import Answer, Block, Stale
from specpair_target.sessions import Session

__all__ = ["Lane", "Waiting", "oldest"]

# Weight of the newest turnaround in the running mean and in the running deviation, and how many deviations later than
# on average a session is still expected: as TCP estimates its retransmission timeout (RFC 6298).
_WEIGHT = 0.25
_CAUTION = 4


@dataclass(frozen=True)
class Waiting:
    """A block that waits, and where its answer goes."""

    block: Block
    answer: Future[Answer]
    queued_ns: int = field(default_factory=time.perf_counter_ns)

    def reply(self, outcome: Answer | SpecpairError) -> None:
        """Answers the block, unless whoever sent it has gone."""
        if not self.answer.set_running_or_notify_cancel():
            return
        if isinstance(outcome, SpecpairError):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)


@dataclass(eq=False)
class Lane:
    """One session's blocks in order of arrival. The first is under way or will be; the others wait for its verdict.

    `ready_ns` is when the session could have been part of a step, None while it cannot. `turnaround_ns` and
    `deviation_ns` are running figures of the time from an answer with nothing behind it to the session's next block.
    """

    session: Session
    blocks: deque[Waiting] = field(default_factory=deque)
    ready_ns: int | None = None
    answered_ns: int | None = None
    turnaround_ns: float | None = None
    deviation_ns: float = 0.0

    def push(self, waiting: Waiting) -> None:
        """Takes a block."""
        if not self.blocks and self.answered_ns is not None:
            self._learn(waiting.queued_ns - self.answered_ns)
        self.blocks.append(waiting)

    def settle(self) -> bool:
        """Answers the first blocks as long as they cannot be applied; whether the session can be part of a step now.

        To be called when the session's last verdict is known, so that each block meets the state that it would have met
        had it been sent after that verdict. Committed tokens that a resumed session has to replay need no block.
        """
        session = self.session
        while self.blocks:
            if session.closed:
                self.blocks.popleft().answer.cancel()
            elif session.failure is not None:
                self.blocks.popleft().reply(session.failure)
            elif not self.blocks[0].block.continues(session):
                self.blocks.popleft().reply(Stale(session.length))
            else:
                break
        able = session.prefilled and session.failure is None and not session.closed
        replays = not (session.caught_up or session.finish_reason)
        if not able or not (self.blocks or replays):
            self.ready_ns = None
            return False
        if self.ready_ns is None:
            self.ready_ns = time.perf_counter_ns()
        return True

    def answered(self) -> Waiting:
        """Takes the first block out, whose answer is known now."""
        waiting = self.blocks.popleft()
        self.answered_ns = None if self.blocks else time.perf_counter_ns()
        return waiting

    def rest(self) -> None:
        """What comes next does not say how long the session takes to answer: another turn begins."""
        self.answered_ns = None

    @property
    def away(self) -> bool:
        """Whether the session was answered and will send another block, as far as one can tell."""
        return self.answered_ns is not None and not (self.blocks or self.session.finish_reason or self.session.closed)

    @property
    def expected_ns(self) -> int | None:
        """By when a session that is away should have sent its next block; None if nothing is known."""
        if self.answered_ns is None or self.turnaround_ns is None:
            return None
        return self.answered_ns + round(self.turnaround_ns + _CAUTION * self.deviation_ns)

    def _learn(self, turnaround_ns: int) -> None:
        if self.turnaround_ns is None:
            self.turnaround_ns, self.deviation_ns = turnaround_ns, turnaround_ns / 2
            return
        off = abs(turnaround_ns - self.turnaround_ns)
        self.turnaround_ns += _WEIGHT * (turnaround_ns - self.turnaround_ns)
        self.deviation_ns += _WEIGHT * (off - self.deviation_ns)


def oldest(ready: Iterable[Lane]) -> Lane:
    """The lane that has been ready for longest.

    Sessions of one attended length step together, and those step next who share the length of the oldest one. Lengths
    take turns in this way, however many sessions each has: whoever was just served is younger than who waits.
    """
    return min(ready, key=lambda lane: lane.ready_ns or 0)
