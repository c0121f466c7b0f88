"""A circuit breaker: who may use a draft service, and when one that was lost is tried again. No I/O.

    closed      every session may use it
    open        it is lost: nobody asks it for a proposal, and nobody waits for one
    half-open   it says that it is back: one session tries it, beside its turn; the others go on without it

It opens for all sessions of a client at once. What opens it again soon after it was closed is a service that is healthy
and of no use, so each further time it stays open longer before the next trial.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from enum import StrEnum
from weakref import WeakSet

from specpair.clock import loop_time

__all__ = ["Breaker", "Permit", "State"]

_log = logging.getLogger("specpair")

# Seconds until the next trial after a service was lost again soon, doubled with every further time.
_FIRST_COOLDOWN = 0.5
_LONGEST_COOLDOWN = 30.0
# A cooldown is at most this share shorter or longer, so that clients which lost a service together return apart.
_SPREAD = 0.25
# A service has proved itself after so many seconds of use, and so many times the last cooldown.
_PROVED = 5.0
_PROVED_TIMES = 4.0


class State(StrEnum):
    """Of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Permit:
    """A session's leave to use the service: until the breaker opens, which `on_loss` is told the reason of."""

    def __init__(self, breaker: Breaker, on_loss: Callable[[str], None], *, trial: bool) -> None:
        self.trial = trial
        """Whether it is for the one session that tries the service."""
        self.on_loss = on_loss
        self.answered_at = float("-inf")
        self._breaker = breaker

    @property
    def doubtful(self) -> bool:
        """Whether the session that began last waits in vain so far: another one had better not wait as well."""
        return self._breaker.doubtful

    def answered(self) -> None:
        """The service has answered."""
        self.answered_at = self._breaker.now()

    def began(self) -> None:
        """A session has begun well: the service is of use."""
        self._breaker.proved()

    def late(self) -> None:
        """A session has waited in vain for its first answer, which may still come."""
        self._breaker.doubtful = True

    def alone(self, since: float) -> bool:
        """Whether another session got an answer since then: what fails here is not the service as a whole."""
        return self._breaker.served_another(self, since)

    def failed(self, reason: str) -> None:
        """The service is lost. Does nothing if that was known, also if it is back since then."""
        self._breaker.failed(self, reason)

    def release(self) -> None:
        """The session does not use the service any more."""
        self._breaker.release(self)


class Breaker:
    """`now` counts seconds from anywhere; `chance` returns numbers from 0 to 1."""

    def __init__(self, *, now: Callable[[], float] = loop_time, chance: Callable[[], float] = random.random) -> None:
        self.now = now
        self.state = State.CLOSED
        self.reason = ""
        """Why the service was lost, or was refused when it said that it is back."""
        self.losses = 0
        self.returns = 0
        self.doubtful = False
        self._chance = chance
        # A session that was dropped without an end keeps no permit.
        self._permits: WeakSet[Permit] = WeakSet()
        # Times in a row that it was lost or refused without having proved itself.
        self._failures = 0
        self._cooldown = 0.0
        self._trial_at = self._closed_at = float("-inf")

    @property
    def wait(self) -> float:
        """Seconds until the service may be tried."""
        return max(self._trial_at - self.now(), 0.0)

    def enter(self, on_loss: Callable[[str], None]) -> Permit | None:
        """Leave to use the service; None while it is lost, or somebody else tries it."""
        if self.state is State.OPEN or (self.state is State.HALF_OPEN and self._permits):
            return None
        permit = Permit(self, on_loss, trial=self.state is State.HALF_OPEN)
        self._permits.add(permit)
        return permit

    def lose(self, reason: str) -> None:
        """Opens: takes away every permit."""
        if self.state is State.OPEN:
            return
        trial = self.state is State.HALF_OPEN
        if not trial and self.now() - self._closed_at >= max(_PROVED, _PROVED_TIMES * self._cooldown):
            self._failures = 0
        self.state, self.doubtful = State.OPEN, False
        self._cool_down(reason, known=trial)
        self.losses += not trial
        permits, self._permits = list(self._permits), WeakSet()
        for permit in permits:
            permit.on_loss(reason)

    def refuse(self, reason: str) -> None:
        """The service says that it is back and cannot be used: it stays open."""
        self._cool_down(reason, known=reason == self.reason)

    def admit(self) -> None:
        """The service says that it is back and may be tried."""
        if self.state is State.OPEN:
            self.state = State.HALF_OPEN

    def proved(self) -> None:
        """A session has begun well: closes, if that was a trial."""
        self.doubtful = False
        if self.state is State.HALF_OPEN:
            self.state, self._closed_at = State.CLOSED, self.now()
            self.returns += 1
            for permit in self._permits:
                permit.trial = False
            _log.info("the draft is back")

    def failed(self, permit: Permit, reason: str) -> None:
        """Opens, if the permit still held."""
        if permit in self._permits:
            self.lose(reason)

    def release(self, permit: Permit) -> None:
        """Gives a permit back; after a trial without an end another session may try."""
        self._permits.discard(permit)

    def served_another(self, permit: Permit, since: float) -> bool:
        """Whether a session with another permit got an answer since then."""
        return any(other.answered_at >= since for other in self._permits if other is not permit)

    def _cool_down(self, reason: str, *, known: bool) -> None:
        """`known` if the service had not been of use since the last time."""
        self._cooldown = 0.0
        if self._failures:
            longest = min(_FIRST_COOLDOWN * 2.0 ** (self._failures - 1), _LONGEST_COOLDOWN)
            self._cooldown = longest * (1.0 + _SPREAD * (2.0 * self._chance() - 1.0))
        self._failures += 1
        self._trial_at = self.now() + self._cooldown
        self.reason = reason
        _log.log(logging.DEBUG if known else logging.WARNING, "%s; going on with n-gram", reason)
