"""Who makes proposals: a draft service. Lookups are in `combining`, what becomes of a lost service in `failover`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from specpair.errors import ProtocolError
from specpair.loop import Ask
from specpair.messages import DraftAsk, DraftStart, DraftStarted, Fingerprint, Proposal
from specpair.pacing import FixedPacer, Pacer, Round
from specpair.results import Source
from specpair.transports import DraftTransport, ProposeStream

__all__ = ["ModelDraft", "Nobody", "Proposer", "nothing"]

# Ids that a draft service proposes at once, and proposals that it sends for one ask.
_MOST_TOKENS = 64
_MOST_PROPOSALS = 16


class Proposer(Protocol):
    """Answers asks. A proposal is advice: whatever it says, the output stays the target's.

    A proposer paces itself: `ask.max_tokens` is what a block may have, and of that it proposes as much as pays by what
    it has observed, in `Proposal.asked` how much it meant to. While `ask.ahead` is above 0 it adds one id more, if it
    proposes anything. Whoever asks may be cancelled while it waits, and ask for something else.
    """

    @property
    def name(self) -> str:
        """As in `Stats.proposer`."""
        ...

    async def propose(self, ask: Ask) -> Proposal: ...

    def observe(self, round: Round) -> None:
        """Learns what became of a block. Not told of a turn's first, nor of those that were dropped unjudged."""
        ...

    def tempted(self, token_ids: Sequence[int], most: int) -> bool:
        """Whether plain steps should end, since it has up to `most` ids to propose behind these committed tokens."""
        ...


def nothing(ask: Ask, *, plain: int = 0) -> Proposal:
    """The proposal for a plain decoding step, with so many more of them to follow."""
    return Proposal(ask.round, len(ask.token_ids), (), Source.TARGET, plain=plain)


class Nobody:
    """Proposes nothing."""

    name = "none"

    def __init__(self) -> None:
        self._pacer = FixedPacer(0)

    async def propose(self, ask: Ask) -> Proposal:
        return nothing(ask, plain=self._pacer.idle())

    def observe(self, round: Round) -> None:
        pass

    def tempted(self, token_ids: Sequence[int], most: int) -> bool:
        return False


class ModelDraft:
    """A session at a draft service. Every turn starts with `begin`; the service hears of it with the turn's first ask.

    While blocks are sent ahead the service is asked for several proposals at once, each to be continued by the next.
    As long as the session goes where they lead they are used up without another ask, and with the last of them goes
    the next ask, so that the way to the service and back is seldom waited for. A session that goes elsewhere asks anew:
    what is still on its way then belongs to an earlier round, and is passed over.

    `propose` raises an exception of `specpair.errors` when the service fails or breaks the protocol; the session cannot
    be used afterwards. `on_answer` is called with every message from the service that is of use. `fits` raises
    DraftMismatchError where the process that has started a turn means something else by its ids.
    """

    name = "model"

    def __init__(
        self,
        transport: DraftTransport,
        pacer: Pacer,
        *,
        within: float | None = None,
        on_answer: Callable[[], None] = lambda: None,
        fits: Callable[[Fingerprint], None] = lambda fingerprint: None,
    ) -> None:
        self._pacer = pacer
        self._transport = transport
        self._within = within
        self._on_answer = on_answer
        self._fits = fits
        self._stream: ProposeStream | None = None
        self._start: DraftStart | None = None
        self._starting = 0
        # The session's tokens as the service was last told, how many of them were committed then, and what it has
        # proposed behind them since. Of the proposals that were asked for, `_due` are to come.
        self._told: list[int] = []
        self._committed = 0
        self._said: list[int] = []
        self._round = self._index = self._due = self._asked = 0

    def begin(self, start: DraftStart) -> None:
        """Starts a turn."""
        self._start = start

    @property
    def fresh(self) -> bool:
        """Whether the service has not answered in this turn yet: its first answer includes the prefill."""
        return self._start is not None or self._starting > 0

    def observe(self, round: Round) -> None:
        self._pacer.observe(round)

    def tempted(self, token_ids: Sequence[int], most: int) -> bool:
        return False

    async def propose(self, ask: Ask) -> Proposal:
        if (asked := self._pacer.draft_length(ask.max_tokens)) == 0:
            return nothing(ask, plain=self._pacer.idle() if ask.max_tokens else 0)
        if self._start is not None:
            await self._begin(self._start)
        agreed = self._agreed(ask.token_ids)
        self._committed = ask.committed
        if self._due == 0 or agreed < len(self._told) or list(ask.token_ids[agreed:]) != self._said:
            await self._ask(agreed, ask.token_ids[agreed:], asked, ask.ahead)
        meant = min(self._asked, ask.max_tokens)
        answer = await self._receive()
        if self._due == 0 and ask.ahead and answer.token_ids:
            await self._ask(len(self._told), self._said, asked, ask.ahead)
        return replace(answer, round=ask.round, asked=meant)

    async def warm(self) -> None:
        """Begins the turn and waits for one id behind its start: the prefill is over. Raises as `propose`."""
        if self._start is not None:
            await self._begin(self._start)
        await self._ask(len(self._told), (), 1, 0)
        await self._receive()

    async def finish(self) -> None:
        """The session has ended well: says so to the service."""
        if self._stream is not None:
            await self._stream.finish()

    def cancel(self) -> None:
        """Lets go of the service at once."""
        if self._stream is not None:
            self._stream.cancel()

    async def _begin(self, start: DraftStart) -> None:
        """Opens the session at the service, or its next turn."""
        if self._stream is None:
            self._stream = await self._transport.propose(start, self._within)
            self._start = None
        else:
            self._start = None  # what is sent is sent, also if this task is cancelled meanwhile
            await self._stream.send(start)
        self._starting += 1
        self._told, self._said, self._due = list(start.token_ids), [], 0
        self._committed = len(self._told)

    async def _ask(self, position: int, token_ids: Sequence[int], asked: int, ahead: int) -> None:
        """Asks anew: from `position` on, the session's tokens are these."""
        news = tuple(token_ids)
        self._told[position:] = news
        self._said = []
        self._round += 1
        self._index, self._due, self._asked = 0, min(1 + ahead, _MOST_PROPOSALS), asked
        count = min(asked + (ahead > 0), _MOST_TOKENS)
        assert self._stream is not None, "a turn starts with begin"
        await self._stream.send(DraftAsk(self._round, position, news, count, self._due, self._pacer.min_confidence))

    async def _receive(self) -> Proposal:
        """The next proposal of the current round."""
        assert self._stream is not None, "a turn starts with begin"
        while True:
            answer = await self._stream.receive()
            if isinstance(answer, DraftStarted):
                if self._starting == 0:
                    raise ProtocolError("the draft started twice")
                self._starting -= 1
                if answer.fingerprint is not None:
                    self._fits(answer.fingerprint)
            elif answer.round >= self._round:
                break
        if self._starting:
            raise ProtocolError("the draft proposed before it started")
        expected = (self._round, self._index, len(self._told) + len(self._said))
        answered = (answer.round, answer.index, answer.base_length)
        if answered != expected:
            raise ProtocolError(f"the draft answered {answered} when asked for {expected}: round, index, base_length")
        self._on_answer()
        self._said += answer.token_ids
        self._index += 1
        self._due -= 1
        return answer

    def _agreed(self, token_ids: Sequence[int]) -> int:
        """How many of the session's first tokens are what the service was told. What was committed then still holds."""
        told = self._told
        agreed = min(self._committed, len(told))
        while agreed < min(len(told), len(token_ids)) and told[agreed] == token_ids[agreed]:
            agreed += 1
        return agreed
