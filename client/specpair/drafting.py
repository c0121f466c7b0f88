"""Who proposes in a turn: settled when it begins, from what the client was told and what it finds out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from specpair.breaker import State
from specpair.combining import Combined, LookupDraft
from specpair.compatibility import Pairing
from specpair.corpus import Corpus
from specpair.depth import Depth
from specpair.experience import Experience
from specpair.failover import Fallback, Link
from specpair.lookup import Lookup
from specpair.messages import DraftStart, ModelInfo
from specpair.meter import Meter
from specpair.naming import Kind
from specpair.pacing import FixedPacer
from specpair.params import AcceptanceRule
from specpair.prediction import PredictedOutput, predicted_ids
from specpair.proposers import ModelDraft, Nobody, Proposer
from specpair.recovery import Recovery
from specpair.transports import TargetTransport
from specpair.turn import Turn

__all__ = ["Drafting", "Plan", "SessionDraft"]

_log = logging.getLogger("specpair")


@dataclass(frozen=True, slots=True)
class Plan:
    """How a turn is going to speculate."""

    proposer: Callable[[DraftStart], Proposer]
    """Makes the proposer, once the tokens of the prompt are known."""
    vocabulary_size: int | None = None
    """Ids from here on are not sent to the target; None if the proposer knows none of them."""


class Drafting:
    """What a client was told about proposing, see `ClientOptions`.

    `pairing` is None if no draft service is meant; `info` asks the target what it runs.
    """

    def __init__(
        self,
        kind: Kind,
        target: TargetTransport,
        pairing: Pairing | None,
        *,
        length: int | None,
        timeout: float,
        lookup: bool | None = None,
        corpus: Corpus | None = None,
        chain: int | None = None,
        info: Callable[[], Awaitable[ModelInfo]],
    ) -> None:
        self.kind = kind
        self.target = target
        self.recovery = None if pairing is None else Recovery(pairing)
        self.length = length
        self.timeout = timeout
        self.lookup = lookup
        self.corpus = corpus
        self.experience = Experience(chain)
        self._info = info
        self._vocabulary_size: int | None = None
        self._refusal = ""

    def session(self, within: float | None = None, *, length: int | None = None) -> SessionDraft:
        """The proposers of a new session; `length` is a fixed draft length for one that was told none."""
        return SessionDraft(self, within, length=self.length if self.length is not None else length)

    def combines(self, turn: Turn, length: int | None) -> bool:
        """Whether lookups propose beside the model.

        Which of the two does depends on measured times, so by itself a client lets them only where neither the output
        nor what was asked for does: not under the rejection rule, and not with a fixed draft length.
        """
        if self.lookup is not None:
            return self.lookup
        given = self.corpus is not None or turn.prediction is not None
        return given or (length is None and turn.params.rule != AcceptanceRule.REJECTION)

    async def vocabulary_size(self) -> int | None:
        """The target's, asked for once; None if it does not know it yet."""
        if self._vocabulary_size is None and (found := (await self._info()).fingerprint) is not None:
            self._vocabulary_size = found.vocabulary_size
        return self._vocabulary_size

    async def fitting(self, recovery: Recovery) -> int | None:
        """The vocabulary's size, for a turn with a draft service; whether that is in use is up to its breaker.

        When the client first uses the two, they are compared; a service that cannot be used then is as one that is
        lost. Raises DraftMismatchError if it must be used and can never be, and what the target raises.
        """
        pairing, breaker = recovery.pairing, recovery.breaker
        if breaker.state is State.CLOSED:
            agreement = await pairing.check()
            self._vocabulary_size = agreement.vocabulary_size
            if agreement.refusal and (agreement.mismatch is None or self.kind != "model"):
                breaker.lose(agreement.refusal)
        recovery.want()
        if pairing.mismatch is not None and self.kind == "model":
            raise copy.copy(pairing.mismatch)
        return await self.vocabulary_size()

    def note(self, refusal: str) -> None:
        """Says why the draft service cannot be used by a session: once, not with every one."""
        if refusal != self._refusal:
            _log.warning("%s; a session goes on with n-gram", refusal)
        self._refusal = refusal

    async def aclose(self) -> None:
        """Ends what goes on beside the sessions."""
        if self.recovery is not None:
            await self.recovery.aclose()


class SessionDraft:
    """The proposers of one session: at most one stream at the draft service, kept over the turns."""

    def __init__(self, told: Drafting, within: float | None = None, *, length: int | None = None) -> None:
        self._told = told
        self._within = within
        self._length = length
        self._knows = told.experience.begin()
        self._link: Link | None = None
        if told.recovery is not None:
            connect = partial(self._connect, told.recovery.pairing)
            self._link = Link(told.recovery, connect, timeout=told.timeout, within=within, note=told.note)

    @property
    def depth(self) -> Depth:
        """How many blocks to send ahead of verdicts."""
        return self._knows.depth

    async def plan(self, turn: Turn) -> Plan:
        """The draft service if there is one that can be used, with lookups beside it, else lookups alone.

        Raises DraftMismatchError if the draft service must be used and cannot be, InvalidRequestError if the prediction
        cannot be one, and what the target raises.
        """
        told, meter = self._told, turn.meter
        if told.kind == "none":
            return Plan(lambda _: Nobody())
        meter.use("ngram")
        expected = None if turn.prediction is None else await predicted_ids(told.target, turn.prediction)
        lookups = partial(self._lookups, expected)
        if told.recovery is None or self._link is None:
            strange = told.corpus is not None or expected is not None
            return Plan(lookups, await told.vocabulary_size() if strange else None)
        vocabulary_size = await told.fitting(told.recovery)
        meter.use("model")
        pair = partial(self._pair, self._link, meter, lookups, told.combines(turn, self._length))
        return Plan(pair, vocabulary_size)

    def keep(self, turn: Turn) -> None:
        """A turn has reached its end: others learn from it, and its output goes to the corpus, if there is one."""
        self._told.experience.keep(self._knows)
        if self._told.corpus is not None:
            self._told.corpus.add([token.id for token in turn.tokens])

    async def finish(self) -> None:
        """The session has ended well: says so to the draft service."""
        if self._link is not None:
            await self._link.finish()

    def cancel(self) -> None:
        """Lets go of the draft service at once."""
        if self._link is not None:
            self._link.cancel()

    def _lookups(self, expected: tuple[int, ...] | None, start: DraftStart) -> LookupDraft:
        """Lookups in the session's own text, and in what was given beforehand."""
        prediction = None if expected is None else PredictedOutput(expected, len(start.token_ids))
        # Under the rejection rule the output depends on which positions share a block.
        by_rule = start.params.rule == AcceptanceRule.REJECTION
        lookup = Lookup(self._told.corpus, prediction)
        return LookupDraft(lookup, self._knows.yields, self._length, repeatable=by_rule)

    def _pair(
        self, link: Link, meter: Meter, lookups: Callable[[DraftStart], LookupDraft], combined: bool, start: DraftStart
    ) -> Proposer:
        """The draft service with lookups behind it, and beside it if they are combined."""
        looking, yields = lookups(start), self._knows.yields

        def modelled(draft: ModelDraft) -> Proposer:
            return Combined(draft, looking, yields) if combined else draft

        return Fallback(link, start, modelled, looking, on_change=meter.change)

    def _connect(self, pairing: Pairing, start: DraftStart, on_answer: Callable[[], None]) -> ModelDraft:
        """A session at the draft service, which is paced by all that is known, also from before it was lost."""
        pacer = self._knows.pacer(start.params) if self._length is None else FixedPacer(self._length)
        return ModelDraft(pairing.draft, pacer, within=self._within, on_answer=on_answer, fits=pairing.fits)
