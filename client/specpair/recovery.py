"""Finds out whether a lost draft service is back: beside the turns, none of which waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from specpair.breaker import Breaker, Permit, State
from specpair.compatibility import Pairing
from specpair.errors import SpecpairError, UnsupportedError

__all__ = ["Recovery"]

# Seconds between two questions for the service's health: at first, and at most. A channel connects again in its own
# time, about a second apart, which comes on top.
_FIRST, _LONGEST = 0.2, 0.5
# Seconds that an answer may take: a process that stands still accepts the question, and answers when it goes on.
_HEALTH = 1.0
# Seconds for which questions go on after the last session has asked for the service.
_INTEREST = 5.0


class Recovery:
    """Lets sessions in to a draft service through its breaker, and looks after the service while that is open.

    A task then asks the service for its health, and when it is serving, whether it still fits the target: what comes
    back at an address may be another draft. The task is there only while sessions want the service, which they say with
    every round that goes without it. It ends by itself `_INTEREST` seconds after the last of them, with `aclose`, and
    with its event loop. So an idle client asks nobody, and one that was never closed is not kept alive.
    """

    def __init__(
        self,
        pairing: Pairing,
        breaker: Breaker | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> None:
        self.pairing = pairing
        self.breaker = breaker or Breaker()
        self._sleep = sleep or asyncio.sleep
        self._wanted_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def enter(self, on_loss: Callable[[str], None]) -> Permit | None:
        """Leave to use the service, as `Breaker.enter`; while there is none, the service is looked after."""
        if (permit := self.breaker.enter(on_loss)) is None:
            self.want()
        return permit

    def want(self) -> None:
        """Somebody would use the service."""
        self._wanted_at = self.breaker.now()
        running = self._task is not None and not self._task.done()
        if self.breaker.state is State.OPEN and not running and not self._closed:
            self._task = asyncio.create_task(self._look_after())

    async def aclose(self) -> None:
        """Ends the task, if there is one."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look_after(self) -> None:
        breaker, pause = self.breaker, _FIRST
        while breaker.state is State.OPEN and breaker.now() - self._wanted_at <= _INTEREST:
            await self._sleep(max(pause, min(breaker.wait, _INTEREST)))
            pause = min(2.0 * pause, _LONGEST)
            if breaker.wait > 0.0 or not await self._serving():
                continue
            try:
                refusal = (await self.pairing.renew()).refusal
            except SpecpairError:
                continue  # the target's: the turns will see to it
            if refusal:
                breaker.refuse(refusal)
            else:
                breaker.admit()

    async def _serving(self) -> bool:
        try:
            return await self.pairing.draft.healthy(_HEALTH)
        except UnsupportedError:
            return True  # a service without health answers nonetheless: its description says whether it is ready
        except SpecpairError:
            return False
