"""The KV slots of a service, and who waits for one."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque

from specpair.errors import OverloadedError

__all__ = ["SlotPool"]

# Seconds: about what a short generation takes.
_RETRY_AFTER = 1.0


class SlotPool:
    """Hands out slots, lowest first, to waiters in order of arrival. Lives on one event loop."""

    def __init__(self, slots: int, max_waiting: int, max_patience: float) -> None:
        """At most `max_waiting` sessions wait, each at most `max_patience` seconds."""
        self.slots = slots
        self._free = list(range(slots))
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._max_waiting = max_waiting
        self._max_patience = max_patience

    @property
    def in_use(self) -> int:
        """Slots that belong to a session now."""
        return self.slots - len(self._free)

    async def acquire(self, patience: float | None = None) -> int:
        """A slot. Raises OverloadedError when none becomes free within `patience` seconds, or too many wait."""
        if self._free:
            return heapq.heappop(self._free)
        if len(self._waiting) >= self._max_waiting:
            raise _exhausted(f"{len(self._waiting)} sessions wait for a slot already")
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        limit = self._max_patience if patience is None else min(patience, self._max_patience)
        try:
            # Not wait_for, which until Python 3.12 forgets a cancellation that comes together with the slot.
            async with asyncio.timeout(limit):
                return await waiter
        except (TimeoutError, asyncio.CancelledError) as ended:
            # The slot may have been handed over in this very moment.
            if waiter.done() and not waiter.cancelled():
                self.release(waiter.result())
            if isinstance(ended, asyncio.CancelledError):
                raise
            raise _exhausted(f"all {self.slots} slots stayed in use") from None
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def release(self, slot: int) -> None:
        """Gives a slot back."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(slot)
                return
        heapq.heappush(self._free, slot)


def _exhausted(message: str) -> OverloadedError:
    return OverloadedError(message, reason="KV_SLOTS_EXHAUSTED", retry_after=_RETRY_AFTER)
