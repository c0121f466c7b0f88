"""The targets that a client may use: one at a time, and the next one when that is lost."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from itertools import count
from typing import TypeVar

from specpair.backoff import Patience, Timing
from specpair.errors import DeadlineError, OverloadedError, SpecpairError, UnauthenticatedError, UnavailableError
from specpair.losses import TARGET_CHANGED, is_lost
from specpair.messages import Committed, Explain, Fingerprint, ModelInfo, Phase, Start, Started
from specpair.params import Prompt
from specpair.results import PositionExplanation
from specpair.transports import Receiver, TargetTransport, VerifyStream

__all__ = ["Identity", "Replica", "Replicas"]

_log = logging.getLogger("specpair")

# What one target may say to a session that another one would take.
_REFUSALS = (OverloadedError, UnauthenticatedError)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Identity:
    """What decides a target's output besides the request: one that differs in any of it may say something else."""

    model: str
    dtype: str
    quantization: str
    verify_width: int
    max_length: int
    fingerprint: Fingerprint
    digest: str
    """Covers all the others, and what is in no other field: the weights, and what rounds."""

    def differences(self, other: Identity) -> str:
        """What the other one has instead, for people."""
        pairs = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        differing = ", ".join(
            "another fingerprint" if name == "fingerprint" else f"{name} {theirs} instead of {ours}"
            for name, ours, theirs in pairs
            if ours != theirs and name != "digest"
        )
        return differing or "other weights, software or hardware"


@dataclass(eq=False, slots=True)
class Replica:
    """A target and where it is. `identity` is None until it has been asked, and again once it was lost."""

    address: str
    target: TargetTransport
    identity: Identity | None = None


class Replicas:
    """Targets that stand for each other, as one transport: calls go to the current one until that is lost.

    What has not begun is tried at every address once, and then, if a target was reached before, for `within` seconds,
    in which it may be back; targets that were never there fail at once. A session that has begun goes on at `matching`
    replicas: those that run what it began with, which is asked anew after every loss. New sessions begin where others
    began before, or, if all targets run something else by now, with that, as long as the same ids mean the same.
    """

    def __init__(
        self,
        targets: Sequence[tuple[str, TargetTransport]],
        *,
        within: float,
        timing: Timing | None = None,
    ) -> None:
        self._replicas = [Replica(address, target) for address, target in targets]
        self._current = self._replicas[0]
        self._within = within
        self.timing = timing or Timing()
        self._identity: Identity | None = None
        self._warned: dict[Replica, str] = {}

    @property
    def several(self) -> bool:
        """Whether there is another one for each."""
        return len(self._replicas) > 1

    async def matching(self, identity: Identity | None = None) -> Replica:
        """The first replica, from the current one on, that runs what `identity` says, or what they ran so far if it is
        None. Raises UnavailableError if one cannot be asked, and with the reason TARGET_CHANGED if none does.
        """
        first = self._replicas.index(self._current)  # others may move on meanwhile
        for replica in self._replicas[first:] + self._replicas[:first]:
            if (found := replica.identity) is None:
                found = await self.at(replica, self._identify)
            expected = identity or self._identity or found
            self._identity = self._identity or found
            if found == expected:
                return replica
            differences = f"the target at {replica.address} has {expected.differences(found)}"
            self._pass_over(replica, differences)
        raise UnavailableError(differences, reason=TARGET_CHANGED)

    async def at(self, replica: Replica, work: Callable[[Replica], Awaitable[T]]) -> T:
        """What `work` brings at a replica. If that is lost or lets nobody in, the next one is the current one."""
        try:
            return await work(replica)
        except SpecpairError as error:
            if is_lost(error) or isinstance(error, _REFUSALS):
                self.leave(replica)
            raise

    def leave(self, replica: Replica) -> None:
        """A replica is of no use now: others go first, and what it runs has to be asked again."""
        replica.identity = None
        self._next(replica)

    async def first(self, work: Callable[[Replica], Awaitable[T]], *, check: bool = True) -> T:
        """What `work` brings where nothing has begun yet. `check` finds out first what the replica runs."""
        patience = Patience(self._within, self.timing, running=True)
        for tries in count(1):
            try:
                return await self.at(await self._beginning() if check else self._current, work)
            except SpecpairError as error:
                refused = isinstance(error, _REFUSALS)
                if tries < len(self._replicas) and (refused or is_lost(error)):
                    if refused:
                        _log.warning("a target is passed over: %s", error)
                    continue
                if refused or not is_lost(error) or self._identity is None:
                    raise
                await patience.wait(error)
        raise AssertionError("there is always another try")

    async def _beginning(self) -> Replica:
        """Where a session may begin."""
        try:
            return await self.matching()
        except UnavailableError as changed:
            current, before = self._current.identity, self._identity
            if changed.reason != TARGET_CHANGED or current is None or before is None:
                raise
            if current.fingerprint != before.fingerprint:
                raise
            _log.warning("%s; new sessions begin with that", changed)
        self._identity = current
        return await self.matching()

    async def _ask(self, replica: Replica, within: float | None = None) -> ModelInfo:
        within = self._within if within is None else within
        try:
            info = await replica.target.info(within)
        except DeadlineError:
            # The time was this question's own, not the caller's.
            raise UnavailableError(f"the target did not answer within {within:g} s") from None
        if info.phase is Phase.READY and info.fingerprint is not None:
            replica.identity = Identity(
                info.model,
                info.dtype,
                info.quantization,
                info.verify_width,
                info.max_length,
                info.fingerprint,
                info.identity,
            )
            self._identity = self._identity or replica.identity
        return info

    async def _identify(self, replica: Replica) -> Identity:
        info = await self._ask(replica)
        if replica.identity is None:
            raise UnavailableError(f"the target is {info.phase}", reason="NOT_READY")
        return replica.identity

    def _pass_over(self, replica: Replica, differences: str) -> None:
        if len(self._replicas) > 1 and self._warned.get(replica) != differences:
            _log.warning("%s; it is passed over", differences)
            self._warned[replica] = differences
        self._next(replica)

    def _next(self, replica: Replica) -> None:
        if replica is self._current:
            self._current = self._replicas[(self._replicas.index(replica) + 1) % len(self._replicas)]

    # The transport. A client that has not asked yet what its target runs need not know it for these.

    async def _call(self, work: Callable[[TargetTransport], Awaitable[T]]) -> T:
        return await self.first(lambda replica: work(replica.target), check=self._identity is not None)

    async def info(self, within: float | None = None) -> ModelInfo:
        """What the current one runs. Raises UnavailableError if it does not say so within `within` seconds."""
        return await self.first(partial(self._ask, within=within), check=False)

    async def verify(self, start: Start, within: float | None = None) -> VerifyStream:
        return await self._call(lambda target: target.verify(start, within))

    async def generate(self, start: Start, within: float | None = None) -> Receiver[Started | Committed]:
        return await self._call(lambda target: target.generate(start, within))

    async def explain(self, question: Explain, within: float | None = None) -> tuple[PositionExplanation, ...]:
        return await self._call(lambda target: target.explain(question, within))

    async def tokenize(
        self, prompt: Prompt, within: float | None = None, *, continuation: bool = False
    ) -> tuple[int, ...]:
        return await self._call(lambda target: target.tokenize(prompt, within, continuation=continuation))

    async def detokenize(
        self, token_ids: tuple[int, ...], keep_special_tokens: bool, within: float | None = None
    ) -> str:
        return await self._call(lambda target: target.detokenize(token_ids, keep_special_tokens, within))

    async def healthy(self, within: float | None = None) -> bool:
        """Whether any of them is serving."""
        for replica in self._replicas:
            with suppress(SpecpairError):
                if await replica.target.healthy(within):
                    return True
        return False

    async def close(self) -> None:
        for replica in self._replicas:
            await replica.target.close()
