"""Who makes proposals: a draft service, prompt lookup in this process, and the one behind the other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from specpair.errors import ProtocolError, SpecpairError
from specpair.loop import Ask
from specpair.messages import DraftAsk, DraftStart, DraftStarted, Proposal
from specpair.ngram import NgramIndex
from specpair.pacing import FixedPacer, GoodputPacer, Pacer
from specpair.results import Source
from specpair.transports import DraftTransport, ProposeStream

__all__ = ["Fallback", "ModelDraft", "NgramDraft", "Nobody", "Proposer"]

_log = logging.getLogger("specpair")

# An ask may name up to this many ids; prompt lookup costs the same for one as for all of them.
_MOST_TOKENS = 64


class Proposer(Protocol):
    """Answers asks. A proposal is advice: whatever it says, the output stays the target's."""

    @property
    def name(self) -> str:
        """As in `Stats.proposer`."""
        ...

    @property
    def pacer(self) -> Pacer:
        """Chooses how much to ask this proposer for."""
        ...

    async def propose(self, ask: Ask) -> Proposal: ...


class Nobody:
    """Proposes nothing."""

    name = "none"

    def __init__(self) -> None:
        self.pacer: Pacer = FixedPacer(0)

    async def propose(self, ask: Ask) -> Proposal:
        return Proposal(ask.round, len(ask.token_ids), (), Source.TARGET)


class NgramDraft:
    """Prompt lookup over a turn's prompt and output."""

    name = "ngram"

    def __init__(self, draft_length: int | None = None) -> None:
        self.pacer: Pacer = FixedPacer(_MOST_TOKENS if draft_length is None else draft_length)
        self._index = NgramIndex()

    async def propose(self, ask: Ask) -> Proposal:
        self._index.extend(ask.token_ids[len(self._index) :])
        ids = tuple(self._index.lookup(ask.max_tokens))
        return Proposal(round=ask.round, base_length=len(ask.token_ids), token_ids=ids, source=Source.NGRAM)


class ModelDraft:
    """A session at a draft service. Every turn starts with `begin`; the service hears of it with the turn's first ask.

    `propose` raises an exception of `specpair.errors` when the service fails or breaks the protocol; the session cannot
    be used afterwards.
    """

    name = "model"

    def __init__(
        self, transport: DraftTransport, *, draft_length: int | None = None, within: float | None = None
    ) -> None:
        self.pacer: Pacer = GoodputPacer() if draft_length is None else FixedPacer(draft_length)
        self._transport = transport
        self._within = within
        self._stream: ProposeStream | None = None
        self._start: DraftStart | None = None
        self._known = 0

    def begin(self, start: DraftStart) -> None:
        """Starts a turn."""
        self._start = start
        self._known = len(start.token_ids)

    @property
    def fresh(self) -> bool:
        """Whether the service has not been asked in this turn yet: its first answer includes the prefill."""
        return self._start is not None

    async def propose(self, ask: Ask) -> Proposal:
        start, self._start = self._start, None
        if start is not None and self._stream is not None:
            await self._stream.send(start)
        elif start is not None:
            self._stream = await self._transport.propose(start, self._within)
        assert self._stream is not None, "a turn starts with begin"
        news = tuple(ask.token_ids[self._known :])
        await self._stream.send(DraftAsk(ask.round, self._known, news, min(ask.max_tokens, _MOST_TOKENS)))
        self._known = len(ask.token_ids)
        answer = await self._stream.receive()
        if start is not None:
            if not isinstance(answer, DraftStarted):
                raise ProtocolError("the draft proposed before it started")
            answer = await self._stream.receive()
        if isinstance(answer, DraftStarted):
            raise ProtocolError("the draft started twice")
        if (answer.round, answer.base_length) != (ask.round, self._known):
            raise ProtocolError(f"the draft answered round {answer.round} when asked for round {ask.round}")
        return answer

    async def finish(self) -> None:
        """The session has ended well: says so to the service."""
        if self._stream is not None:
            await self._stream.finish()

    def cancel(self) -> None:
        """Lets go of the service at once."""
        if self._stream is not None:
            self._stream.cancel()


class Fallback:
    """A draft service as long as it answers in time, prompt lookup from the round on in which it does not.

    `timeout` is what a draft may take for one round, in seconds. A turn's first round, which includes connecting and
    the prefill, may take five times as long. `on_loss` is called with the reason of the change.
    """

    def __init__(self, draft: ModelDraft, ngram: NgramDraft, *, timeout: float, on_loss: Callable[[str], None]) -> None:
        self._draft: ModelDraft | None = draft
        self._ngram = ngram
        self._timeout = timeout
        self._on_loss = on_loss

    @property
    def _current(self) -> Proposer:
        return self._draft or self._ngram

    @property
    def name(self) -> str:
        return self._current.name

    @property
    def pacer(self) -> Pacer:
        return self._current.pacer

    async def propose(self, ask: Ask) -> Proposal:
        if (draft := self._draft) is not None:
            timeout = self._timeout * (5 if draft.fresh else 1)
            try:
                async with asyncio.timeout(timeout):
                    return await draft.propose(ask)
            except TimeoutError:
                self._lose(draft, ask, f"draft lost: no proposal within {timeout:g} s")
            except SpecpairError as lost:
                self._lose(draft, ask, f"draft lost: {lost}")
        return await self._ngram.propose(ask)

    def _lose(self, draft: ModelDraft, ask: Ask, reason: str) -> None:
        _log.warning("%s; going on with n-gram from round %d", reason, ask.round)
        draft.cancel()
        self._draft = None
        self._on_loss(reason)
