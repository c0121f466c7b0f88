"""The KV slots of a service, and who waits for one."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from specpair.errors import OverloadedError
from specpair_runtime.fair_queue import FairQueue
from specpair_runtime.serving.caller import Caller
from specpair_runtime.serving.record import timed

__all__ = ["SlotPool"]

# Sessions by which it is judged how long a slot is held.
_RECENT = 32
# Seconds: about what a short generation takes, for as long as none has ended.
_USUAL_HOLD = 1.0
# Seconds: bounds of the hint when to come back. Behind the longer one nobody knows what will be.
_SOONEST, _LATEST = 0.1, 30.0


@dataclass(eq=False)
class _Waiter:
    caller: Caller
    slot: asyncio.Future[int]
    deadline: float


@dataclass(frozen=True)
class _Holder:
    identity: str
    since: float


class SlotPool:
    """Hands out slots, lowest first, to waiters in order of arrival; identities take turns. Lives on one event loop."""

    def __init__(
        self,
        slots: int,
        max_waiting: int,
        max_patience: float,
        max_sessions: int = 0,
        waited: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """At most `max_waiting` sessions wait, each at most `max_patience` seconds.

        One identity has at most `max_sessions` sessions at a time, those that wait included; 0: as many as it gets.
        `waited` is told of each slot that is handed out, how many seconds its session has waited for it.
        """
        self.slots = slots
        self._free = list(range(slots))
        self._held: dict[int, _Holder] = {}
        self._waiting: FairQueue[_Waiter] = FairQueue()
        self._sessions: Counter[str] = Counter()
        self._holds: deque[float] = deque(maxlen=_RECENT)
        self._max_waiting = max_waiting
        self._max_patience = max_patience
        self._max_sessions = max_sessions
        self._waited = waited

    @property
    def in_use(self) -> int:
        """Slots that belong to a session now."""
        return self.slots - len(self._free)

    @property
    def waiting(self) -> int:
        """Sessions that wait for a slot now."""
        return len(self._waiting)

    def check(self, caller: Caller) -> None:
        """Raises what `acquire` would raise at once: before something is done for a session that cannot be."""
        if caller.deadline is not None and time.monotonic() >= caller.deadline:
            raise self._refusal("the caller's time is up", "KV_SLOTS_EXHAUSTED")
        if self._max_sessions and self._sessions[caller.identity] >= self._max_sessions:
            raise self._refusal(f"at most {self._max_sessions} sessions at a time for one client", "SESSION_LIMIT")
        if self._free:
            return
        if len(self._waiting) >= self._max_waiting and self._waiting.crowded_by(caller.identity) is None:
            raise self._refusal(f"{len(self._waiting)} sessions wait for a slot already", "QUEUE_FULL")
        if caller.deadline is not None and time.monotonic() + self._least_wait(caller.identity) >= caller.deadline:
            raise self._refusal("no slot will be free in the caller's time", "KV_SLOTS_EXHAUSTED")

    async def acquire(self, caller: Caller | None = None) -> int:
        """A slot. Raises OverloadedError, whose `reason` says why there is none:

        - KV_SLOTS_EXHAUSTED: none became free in the caller's time or the pool's, or will not;
        - QUEUE_FULL: too many wait. A full queue still takes an identity that has less in it than another one, whose
          newest session goes instead;
        - SESSION_LIMIT: the identity has all the sessions that one may have.
        """
        caller = caller or Caller()
        began = time.monotonic()
        self.check(caller)
        self._sessions[caller.identity] += 1
        try:
            with timed("queue"):
                slot = heapq.heappop(self._free) if self._free else await self._wait(caller)
        except BaseException:
            self._leave(caller.identity)
            raise
        self._held[slot] = holder = _Holder(caller.identity, time.monotonic())
        self._waited(holder.since - began)
        return slot

    def release(self, slot: int) -> None:
        """Gives a slot back."""
        holder = self._held.pop(slot)
        self._holds.append(time.monotonic() - holder.since)
        self._leave(holder.identity)
        self._pass_on(slot)

    async def _wait(self, caller: Caller) -> int:
        if len(self._waiting) >= self._max_waiting:
            crowding = self._waiting.crowded_by(caller.identity)
            assert crowding is not None, "`check` has refused everybody else"
            last = self._waiting.pop_newest(crowding)
            last.slot.set_exception(self._refusal("the queue is full, and others have less in it", "QUEUE_FULL"))
        deadline = time.monotonic() + self._max_patience
        if caller.deadline is not None:
            deadline = min(deadline, caller.deadline)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(caller, loop.create_future(), deadline)
        self._waiting.push(caller.identity, waiter)
        try:
            # Not wait_for, which until Python 3.12 forgets a cancellation that comes together with the slot.
            async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)):
                return await waiter.slot
        except (TimeoutError, asyncio.CancelledError) as ended:
            # The slot may have been handed over in this very moment.
            if waiter.slot.done() and not waiter.slot.cancelled() and waiter.slot.exception() is None:
                self._pass_on(waiter.slot.result())
            if isinstance(ended, asyncio.CancelledError):
                raise
            raise self._too_late() from None
        finally:
            self._waiting.remove(caller.identity, waiter)

    def _pass_on(self, slot: int) -> None:
        """Gives a free slot to who is next, unless that one's time is up."""
        while self._waiting:
            waiter = self._waiting.pop()
            if waiter.slot.done():
                continue
            if time.monotonic() < waiter.deadline:
                waiter.slot.set_result(slot)
                return
            waiter.slot.set_exception(self._too_late())
        heapq.heappush(self._free, slot)

    def _leave(self, identity: str) -> None:
        self._sessions[identity] -= 1
        if not self._sessions[identity]:
            del self._sessions[identity]

    def _least_wait(self, identity: str) -> float:
        """Seconds that a newcomer waits at least, should the next sessions be as short as the shortest of late.

        All slots may be free in a moment, so only those count who wait behind that many.
        """
        rounds = self._waiting.ahead(identity) // self.slots
        return rounds * min(self._holds, default=0.0)

    def _too_late(self) -> OverloadedError:
        return self._refusal(f"all {self.slots} slots stayed in use", "KV_SLOTS_EXHAUSTED")

    def _refusal(self, message: str, reason: str) -> OverloadedError:
        """The hint when to come back is the time in which those that wait should have had their slots."""
        hold = sum(self._holds) / len(self._holds) if self._holds else _USUAL_HOLD
        wait = hold * (len(self._waiting) + 1) / self.slots
        return OverloadedError(message, reason=reason, retry_after=min(max(wait, _SOONEST), _LATEST))
