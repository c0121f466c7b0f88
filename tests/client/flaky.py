"""A draft service in memory that comes and goes, for any number of sessions at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from specpair.errors import DeadlineError, OverloadedError, UnavailableError
from specpair.messages import DraftAsk, DraftStart, DraftStarted, Fingerprint, ModelInfo, Phase, Proposal
from specpair.results import Source

from .fakes import FINGERPRINT, perfect

# Seconds: how soon a change is noticed.
_TICK = 0.0005


@dataclass
class FlakyDraft:
    """Up, hung, which is connected and silent, or down. `behaviour` answers asks as those in `fakes` do."""

    behaviour: Callable[[FlakyStream, DraftAsk], object] = perfect
    fingerprint: Fingerprint | None = FINGERPRINT
    phase: Phase = Phase.READY
    state: str = "up"
    slots: int | None = None
    retry_after: float | None = None
    life: int = 0
    healths: int = 0
    infos: int = 0
    asks: list[DraftAsk] = field(default_factory=list)
    streams: list[FlakyStream] = field(default_factory=list)

    def kill(self) -> None:
        self.state, self.life = "down", self.life + 1

    def hang(self) -> None:
        self.state = "hung"

    def wake(self) -> None:
        """Goes on, or starts anew."""
        self.state = "up"

    @property
    def open(self) -> list[FlakyStream]:
        """Sessions that have a slot."""
        return [stream for stream in self.streams if stream.holds]

    async def answering(self, within: float | None) -> None:
        try:
            async with asyncio.timeout(within):
                while self.state == "hung":  # noqa: ASYNC110 - an event would have to be kept in step with it
                    await asyncio.sleep(_TICK)
        except TimeoutError:
            raise DeadlineError("no answer") from None
        if self.state == "down":
            raise UnavailableError("connection refused")

    async def info(self, within: float | None = None) -> ModelInfo:
        self.infos += 1
        await self.answering(within)
        return ModelInfo("draft", self.phase, fingerprint=self.fingerprint)

    async def healthy(self, within: float | None = None) -> bool:
        self.healths += 1
        await self.answering(within)
        return self.phase is Phase.READY

    async def propose(self, start: DraftStart, within: float | None = None) -> FlakyStream:
        if self.state == "down":
            raise UnavailableError("connection refused")
        stream = FlakyStream(self, self.life)
        if self.slots is not None and len(self.open) >= self.slots:
            stream.refused = OverloadedError("no slot", retry_after=self.retry_after)
        self.streams.append(stream)
        await stream.send(start)
        return stream

    async def close(self) -> None:
        pass


@dataclass
class FlakyStream:
    """A session at it."""

    service: FlakyDraft
    life: int
    log: list[int] = field(default_factory=list)
    seed: int = 0
    starts: list[DraftStart] = field(default_factory=list)
    answers: deque[object] = field(default_factory=deque)
    refused: Exception | None = None
    finished: bool = False
    cancelled: bool = False
    used: bool = False
    """Whether it has said anything after it was given up."""

    @property
    def holds(self) -> bool:
        over = self.finished or self.cancelled or self.refused is not None
        return not over and self.life == self.service.life

    async def send(self, message: DraftStart | DraftAsk) -> None:
        self.used = self.used or self.cancelled
        if isinstance(message, DraftStart):
            self.starts.append(message)
            self.log, self.seed = list(message.token_ids), message.params.seed or 0
            self.answers.append(DraftStarted(Source.MODEL, 0, self.service.fingerprint))
            return
        assert len(self.starts[-1].token_ids) <= message.from_position <= len(self.log)
        self.service.asks.append(message)
        self.log[message.from_position :] = message.token_ids
        end = len(self.log)
        for index in range(message.proposals):
            answer = self.service.behaviour(self, message)
            if isinstance(answer, Proposal):
                answer = replace(answer, index=index)
                self.log += answer.token_ids
            if answer is not None:
                self.answers.append(answer)
        del self.log[end:]

    async def receive(self) -> object:
        await asyncio.sleep(0)
        while True:
            if self.cancelled:
                raise UnavailableError("the call was ended on this side")
            if self.life != self.service.life:
                raise UnavailableError("the connection broke")
            if self.refused is not None:
                raise self.refused
            if self.service.state == "up" and self.answers:
                answer = self.answers.popleft()
                if isinstance(answer, Exception):
                    raise answer
                return answer
            await asyncio.sleep(_TICK)

    async def finish(self) -> None:
        self.finished = True

    def cancel(self) -> None:
        self.cancelled = True
