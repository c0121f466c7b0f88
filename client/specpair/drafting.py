"""Who proposes in a turn: settled when it begins, from what the client was told and what it finds out."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from specpair.combining import Combined, LookupDraft
from specpair.compatibility import Pairing
from specpair.corpus import Corpus
from specpair.depth import Depth
from specpair.experience import Experience
from specpair.lookup import Lookup
from specpair.messages import DraftStart, ModelInfo
from specpair.meter import Meter
from specpair.pacing import FixedPacer
from specpair.params import AcceptanceRule
from specpair.prediction import PredictedOutput, predicted_ids
from specpair.proposers import Fallback, ModelDraft, Nobody, Proposer
from specpair.transports import TargetTransport
from specpair.turn import Turn

__all__ = ["Drafting", "Kind", "Plan", "SessionDraft"]

Kind = Literal["model", "auto", "ngram", "none"]

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
        self.pairing = pairing
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

    def warn(self, refusal: str) -> None:
        """Says why the draft service cannot be used: once, not with every turn."""
        if refusal != self._refusal:
            _log.warning("%s; going on with n-gram", refusal)
        self._refusal = refusal


class SessionDraft:
    """The proposers of one session: at most one stream at the draft service, kept over the turns.

    A draft service that was lost in one turn is tried again in the next one.
    """

    def __init__(self, told: Drafting, within: float | None = None, *, length: int | None = None) -> None:
        self._told = told
        self._within = within
        self._length = length
        self._model: ModelDraft | None = None
        self._knows = told.experience.begin()

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
        if (pairing := told.pairing) is None:
            strange = told.corpus is not None or expected is not None
            return Plan(lookups, await told.vocabulary_size() if strange else None)
        agreement = await pairing.check()
        if agreement.mismatch is not None and told.kind == "model":
            raise agreement.mismatch
        if agreement.refusal:
            meter.change("ngram", agreement.refusal)
            told.warn(agreement.refusal)
            return Plan(lookups, agreement.vocabulary_size)
        meter.use("model")
        pair = partial(self._pair, pairing, meter, lookups, told.combines(turn, self._length))
        return Plan(pair, agreement.vocabulary_size)

    def keep(self, turn: Turn) -> None:
        """A turn has reached its end: others learn from it, and its output goes to the corpus, if there is one."""
        self._told.experience.keep(self._knows)
        if self._told.corpus is not None:
            self._told.corpus.add([token.id for token in turn.tokens])

    async def finish(self) -> None:
        """The session has ended well: says so to the draft service."""
        if self._model is not None:
            await self._model.finish()

    def cancel(self) -> None:
        """Lets go of the draft service at once."""
        if self._model is not None:
            self._model.cancel()

    def _lookups(self, expected: tuple[int, ...] | None, start: DraftStart) -> LookupDraft:
        """Lookups in the session's own text, and in what was given beforehand."""
        prediction = None if expected is None else PredictedOutput(expected, len(start.token_ids))
        return LookupDraft(Lookup(self._told.corpus, prediction), self._knows.yields, self._length)

    def _pair(
        self,
        pairing: Pairing,
        meter: Meter,
        lookups: Callable[[DraftStart], LookupDraft],
        combined: bool,
        start: DraftStart,
    ) -> Proposer:
        """The draft service with lookups behind it, and beside it if they are combined."""
        told = self._told

        def lost(reason: str) -> None:
            self._model = None
            pairing.forget()  # what comes back at its address may be another draft
            meter.change("ngram", reason)

        if self._model is None:
            pacer = self._knows.pacer(start.params) if self._length is None else FixedPacer(self._length)
            self._model = ModelDraft(pairing.draft, pacer, within=self._within)
        self._model.begin(start)
        looking = lookups(start)
        model = Fallback(self._model, looking, timeout=told.timeout, on_loss=lost)
        return Combined(model, looking, self._knows.yields) if combined else model
