"""What a session does when its draft service is lost, and when it is back.

A turn never waits twice for a service that does not answer. Who loses it goes on with prompt lookup in the same round;
so do all sessions of the client that wait for it at that moment, since the breaker takes away their permits: whenever
their own waiting began, the time of one round has shown the service to be no use, and theirs would show it again. Who
gets it back has the service read all tokens so far and propose one id *beside* the turn, which changes over once that
is there. So neither a trial nor a long prefill is waited for.

A turn that begins is the exception: nothing better is known yet, so it waits for the first proposal, though not longer
than for any other. What takes longer goes on beside the turn, and further turns do not wait until a session has begun
in time.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from specpair import errors, transports
from specpair.breaker import Permit
from specpair.clock import loop_time
from specpair.errors import (
    DeadlineError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    SpecpairError,
    UnavailableError,
)
from specpair.loop import Ask
from specpair.messages import DraftStart, Proposal
from specpair.pacing import Round
from specpair.proposers import ModelDraft, Proposer
from specpair.recovery import Recovery

__all__ = ["Fallback", "Link"]

# The first answer of a session's turn, prefill included, may take so many times as long as others.
_PATIENCE = 5
# Seconds until a session that failed for itself tries again, if the service does not say; doubled every time.
_FIRST_RETRY, _LONGEST_RETRY = 1.0, 30.0
# Where the token ids of a turn's start stand, the target having taken them.
_IDS = ("start.token_ids[", "start.sampling.logit_bias[")
# The key of a bias is a token id, which nothing logs.
_BIAS = re.compile(r"logit_bias\[\d+\]")
# Plain steps between two looks whether the service is back.
_MOST_STEPS = 8

T = TypeVar("T")


class Link:
    """A session's way to its draft service, over its turns: not there, getting ready beside the turn, or in use.

    `connect` makes the session at the service, given its first turn and what to call with every answer. `timeout` is
    what the service may take for a round, in seconds; `within` the caller's own time for the session, if any. `note` is
    called with the reason of a failure that concerns this session alone: no slot for it, or its own request.
    """

    def __init__(
        self,
        recovery: Recovery,
        connect: Callable[[DraftStart, Callable[[], None]], ModelDraft],
        *,
        timeout: float,
        within: float | None = None,
        note: Callable[[str], None] = lambda reason: None,
        now: Callable[[], float] = loop_time,
    ) -> None:
        self.reason = ""
        """Why the service is not in use."""
        self._recovery = recovery
        self._connect = connect
        self._timeout = timeout
        self._within = within
        self._note = note
        self._now = now
        self._draft: ModelDraft | None = None
        self._permit: Permit | None = None
        self._start: DraftStart | None = None
        self._opening = False
        # What is under way: the task that gets the draft ready, or how long a round's answer is waited for.
        self._readying: asyncio.Task[Any] | None = None
        self._patient_until = float("-inf")
        self._limit: asyncio.Timeout | None = None
        self._failures = 0
        self._retry_at = float("-inf")

    def begin(self, start: DraftStart) -> None:
        """Starts a turn."""
        self._start, self._opening = start, True
        if self._readying is not None:
            self.cancel()  # it reads the tokens of a turn that is over
        if self._draft is not None:
            self._draft.begin(start)

    def at(self, ask: Ask) -> ModelDraft | None:
        """The draft, if it can be asked this; while it cannot, the link sees to it that it will be."""
        opening, self._opening = self._opening, False
        if self._draft is None and self._now() >= self._retry_at:
            self._open(ask, opening)
        return self._draft if self._readying is None or self._now() < self._patient_until else None

    async def ask(self, draft: ModelDraft, proposer: Proposer, ask: Ask) -> Proposal | None:
        """What `proposer` answers, which asks the draft that `at` has returned; None if that is lost or not ready."""
        if self._readying is not None:  # begun by an ask that was given up
            if not await self._is_ready(draft, self._readying):
                return None
        elif draft.fresh:
            first = self._first(draft, lambda: proposer.propose(ask))
            return first.result() if await self._is_ready(draft, first) else None
        since = self._now()
        answer, failure = await self._bounded(proposer.propose(ask), self._timeout)
        if failure is not None and self._draft is draft:
            self._failed(failure, since)
        return answer if self._draft is draft else None

    async def finish(self) -> None:
        """The session has ended well: says so to the service."""
        if self._readying is not None:
            self.cancel()
        elif self._draft is not None:
            await self._draft.finish()

    def cancel(self) -> None:
        """Lets go of the service at once."""
        permit, draft, readying = self._permit, self._draft, self._readying
        self._permit = self._draft = self._readying = None
        if permit is not None:
            permit.release()
        if readying is not None and readying is not asyncio.current_task():
            readying.cancel()
        if draft is not None:
            draft.cancel()

    def _open(self, ask: Ask, opening: bool) -> None:
        """Makes a session at the service, if the breaker lets it in."""
        assert self._start is not None, "a turn starts with begin"
        self._permit = permit = self._recovery.enter(self._lost)
        if permit is None:
            self.reason = self._recovery.breaker.reason
            return
        start = self._start
        if not opening:
            start = replace(start, token_ids=tuple(ask.token_ids[: ask.committed]), prompt_length=len(start.token_ids))
        self._draft = draft = self._connect(start, permit.answered)
        draft.begin(start)
        if permit.trial or not opening:
            self.reason = self.reason or self._recovery.breaker.reason
            self._ready(draft, permit, draft.warm)

    def _first(self, draft: ModelDraft, work: Callable[[], Awaitable[T]]) -> asyncio.Task[T | None]:
        """Asks for a turn's first answer, which is waited for no longer than any other."""
        permit = self._permit
        assert permit is not None, "who has a draft has a permit"
        first = self._ready(draft, permit, work)
        self._patient_until = self._now() + (0.0 if permit.doubtful else self._timeout)
        return first

    async def _is_ready(self, draft: ModelDraft, first: asyncio.Task[T]) -> bool:
        """Whether a turn's first answer comes in time; else the draft goes on getting ready beside the turn."""
        await asyncio.wait((first,), timeout=max(self._patient_until - self._now(), 0.0))
        if self._draft is draft and self._permit is not None and not first.done():
            self._permit.late()
            self._patient_until = float("-inf")
            self.reason = f"draft not ready: no proposal within {self._timeout:g} s"
        return first.done() and self._draft is draft

    def _ready(self, draft: ModelDraft, permit: Permit, work: Callable[[], Awaitable[T]]) -> asyncio.Task[T | None]:
        """Gets the draft ready to be asked; what is meanwhile done with it is up to `work`."""

        async def ready() -> T | None:
            since = self._now()
            answer, failure = await self._bounded(work(), self._timeout * _PATIENCE)
            if self._draft is not draft:
                return None
            self._readying = None
            if failure is not None:
                self._failed(failure, since)
            elif not draft.fresh:
                self._failures = 0
                permit.began()
            return answer

        self._readying = task = asyncio.create_task(ready())
        self._patient_until = float("-inf")
        return task

    async def _bounded(self, work: Awaitable[T], seconds: float) -> tuple[T | None, SpecpairError | None]:
        """What comes of `work` in the given time, which `_lost` cuts short."""
        try:
            async with asyncio.timeout(seconds) as self._limit:
                return await work, None
        except TimeoutError:
            return None, _LateError(f"no proposal within {seconds:g} s")
        except SpecpairError as failure:
            return None, failure
        finally:
            self._limit = None

    def _failed(self, failure: SpecpairError, since: float) -> None:
        """The draft has failed while it was waited for since then: for all sessions, or for this one."""
        permit = self._permit
        assert permit is not None, "who has a draft has a permit"
        reason = "draft lost: " + _BIAS.sub("logit_bias", str(failure))
        if not self._own(failure, permit, since):
            permit.failed(reason)
            return
        self.reason = reason
        if isinstance(failure, OverloadedError):
            permit.late()
        self.cancel()
        pause = min(_FIRST_RETRY * 2.0**self._failures, _LONGEST_RETRY)
        self._retry_at = self._now() + (pause if failure.retry_after is None else failure.retry_after)
        self._failures += 1
        if failure.reason != transports.CLOSED:  # else nobody goes on
            self._note(reason)

    def _own(self, failure: SpecpairError, permit: Permit, since: float) -> bool:
        """Whether a failure says nothing about the service's use to other sessions."""
        match failure:
            case InvalidRequestError(field=str(field)) if field.startswith(_IDS):
                return False  # an id that the target knows and the draft does not: another draft than was compared
            case OverloadedError() | InvalidRequestError():
                return True
            case UnavailableError(reason=transports.CLOSED | errors.SESSION_EXPIRED):
                return True
            case DeadlineError():
                return self._within is not None  # the caller's time is over, here as at the service
            case _LateError() | InternalError():
                return permit.alone(since)
        return False

    def _lost(self, reason: str) -> None:
        """The breaker has opened: nobody waits for the service any more."""
        self.reason = reason
        if self._readying is None and self._limit is not None and not self._limit.expired():
            self._limit.reschedule(loop_time())
        self.cancel()


class _LateError(SpecpairError):
    """The draft has not answered in the time of a round."""


class Fallback:
    """A turn's proposer: the draft service while there is one, prompt lookup while there is not.

    `modelled` makes the proposer that asks a given draft. `on_change` is called with the name of the proposer that the
    turn goes on with, and the reason.
    """

    def __init__(
        self,
        link: Link,
        start: DraftStart,
        modelled: Callable[[ModelDraft], Proposer],
        lookups: Proposer,
        *,
        on_change: Callable[[str, str], None],
    ) -> None:
        self.name = "model"
        self._link = link
        self._modelled = modelled
        self._lookups = lookups
        self._on_change = on_change
        self._draft: ModelDraft | None = None
        # Who has proposed from which round on: verdicts come later, and what a draft knows of itself outlives it.
        self._turns: deque[tuple[int, Proposer]] = deque([(0, lookups)])
        link.begin(start)

    async def propose(self, ask: Ask) -> Proposal:
        if (draft := self._link.at(ask)) is not None:
            if draft is not self._draft:
                self._draft = draft
                self._turns.append((ask.round, self._modelled(draft)))
            self._go_on("model", "the draft is ready")
            if (answer := await self._link.ask(draft, self._turns[-1][1], ask)) is not None:
                return answer
        if self._draft is not None:
            self._draft = None
            self._turns.append((ask.round, self._lookups))
        self._go_on(self._lookups.name, self._link.reason)
        answer = await self._lookups.propose(ask)
        return replace(answer, plain=min(answer.plain, _MOST_STEPS))

    def observe(self, round: Round) -> None:
        while len(self._turns) > 1 and self._turns[1][0] <= round.round:
            self._turns.popleft()
        self._turns[0][1].observe(round)

    def tempted(self, token_ids: Sequence[int], most: int) -> bool:
        return self._turns[-1][1].tempted(token_ids, most)

    def _go_on(self, name: str, reason: str) -> None:
        if name != self.name:
            self.name = name
            self._on_change(name, reason)
