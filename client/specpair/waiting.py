"""Waits for services that start, and says how far they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specpair.errors import DeadlineError, SpecpairError, UnavailableError
from specpair.messages import Phase
from specpair.transports import DraftTransport, TargetTransport

__all__ = ["Sight", "Waited", "until_ready"]

# Seconds between two looks at a service, and for one to be answered.
_PAUSE = 0.1
_ANSWER = 2.0

_STARTING = frozenset({Phase.LOADING, Phase.COMPILING, Phase.WARMING_UP})


@dataclass(frozen=True, slots=True)
class Sight:
    """What is to be seen of a service. `progress` runs from 0 to 1 within the phase."""

    phase: Phase | None
    """None: it cannot be reached, or does not say."""
    progress: float = 0.0
    detail: str = ""

    @property
    def starting(self) -> bool:
        """Whether it is on its way to serve."""
        return self.phase in _STARTING

    def __str__(self) -> str:
        phase = self.phase.replace("_", " ") if self.phase else ""
        return self.detail if self.detail.startswith(phase) and self.detail else f"{phase} {self.detail}".rstrip()


@dataclass(frozen=True, slots=True)
class Waited:
    """A service to wait for."""

    role: str
    """Of those with one role it is enough that one is ready, unless each is wanted."""
    address: str
    service: TargetTransport | DraftTransport

    async def look(self) -> Sight:
        """How far it is. Raises what waiting does not change, such as a certificate that is not trusted."""
        try:
            if await self.service.healthy(_ANSWER):
                return Sight(Phase.READY, 1.0)
        except (UnavailableError, DeadlineError) as unreachable:
            return Sight(None, detail=f"not reachable: {unreachable.message}")
        try:
            info = await self.service.info(_ANSWER)
        except SpecpairError:  # health asks for no token, this does
            return Sight(None, detail="not serving")
        if info.phase is Phase.READY:  # it became so between the two answers
            return Sight(Phase.READY, 1.0)
        return Sight(info.phase, info.progress, info.detail)


async def until_ready(
    waited: Sequence[Waited],
    show: Callable[[Waited, Sight], None],
    *,
    within: float | None = None,
    each: bool = False,
) -> None:
    """Waits for services; `show` is told what is seen of each.

    `within` is for how many seconds to wait until one of every role serves, or `each` of them; DeadlineError then.
    None: as long as a target is starting, so that one that cannot be reached, drains or has failed is left to whoever
    calls it. Raises what waiting does not change.
    """
    seen: dict[Waited, Sight] = {}
    try:
        async with asyncio.timeout(within):
            while True:
                for one, sight in zip(waited, await asyncio.gather(*(one.look() for one in waited)), strict=True):
                    seen[one] = sight
                    show(one, sight)
                if _enough(seen, patient=within is not None, each=each):
                    return
                await asyncio.sleep(_PAUSE)
    except TimeoutError:
        missing = [
            f"{one.role} {one.address}: {sight}" for one, sight in seen.items() if sight.phase is not Phase.READY
        ]
        raise DeadlineError(f"not ready within {within:g} s: {'; '.join(missing) or 'no answer'}") from None


def _enough(seen: dict[Waited, Sight], *, patient: bool, each: bool) -> bool:
    if each:
        return all(sight.phase is Phase.READY for sight in seen.values())
    ready = {one.role for one, sight in seen.items() if sight.phase is Phase.READY}
    if patient:
        return ready == {one.role for one in seen}
    return "target" in ready or not any(sight.starting for one, sight in seen.items() if one.role == "target")
