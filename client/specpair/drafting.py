"""Who proposes in a turn: settled when it begins, from what the client was told and what it finds out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from specpair.compatibility import Pairing
from specpair.messages import DraftStart
from specpair.meter import Meter
from specpair.proposers import Fallback, ModelDraft, NgramDraft, Nobody, Proposer

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
    """What a client was told about proposing. `pairing` is None where no draft service is meant."""

    def __init__(self, kind: Kind, pairing: Pairing | None, *, length: int | None, timeout: float) -> None:
        self.kind = kind
        self.pairing = pairing
        self.length = length
        self.timeout = timeout
        self._refusal = ""

    def session(self, within: float | None = None) -> SessionDraft:
        """The proposers of a new session."""
        return SessionDraft(self, within)

    def warn(self, refusal: str) -> None:
        """Says why the draft service cannot be used: once, not with every turn."""
        if refusal != self._refusal:
            _log.warning("%s; going on with n-gram", refusal)
        self._refusal = refusal


class SessionDraft:
    """The proposers of one session: at most one stream at the draft service, kept over the turns.

    A draft service that was lost in one turn is tried again in the next one.
    """

    def __init__(self, told: Drafting, within: float | None = None) -> None:
        self._told = told
        self._within = within
        self._model: ModelDraft | None = None

    async def plan(self, meter: Meter) -> Plan:
        """The draft service if there is one that can be used, else prompt lookup.

        Raises DraftMismatchError if the draft service must be used and cannot be, and what the target raises.
        """
        told = self._told
        if told.kind == "none":
            return Plan(lambda _: Nobody())
        meter.use("ngram")
        if (pairing := told.pairing) is None:
            return Plan(lambda _: NgramDraft(told.length))
        agreement = await pairing.check()
        if agreement.mismatch is not None and told.kind == "model":
            raise agreement.mismatch
        if agreement.refusal:
            meter.change("ngram", agreement.refusal)
            told.warn(agreement.refusal)
            return Plan(lambda _: NgramDraft(told.length))
        meter.use("model")
        return Plan(partial(self._pair, pairing, meter), agreement.vocabulary_size)

    async def finish(self) -> None:
        """The session has ended well: says so to the draft service."""
        if self._model is not None:
            await self._model.finish()

    def cancel(self) -> None:
        """Lets go of the draft service at once."""
        if self._model is not None:
            self._model.cancel()

    def _pair(self, pairing: Pairing, meter: Meter, start: DraftStart) -> Fallback:
        """The draft service with prompt lookup behind it."""
        told = self._told

        def lost(reason: str) -> None:
            self._model = None
            pairing.forget()  # what comes back at its address may be another draft
            meter.change("ngram", reason)

        if self._model is None:
            self._model = ModelDraft(pairing.draft, draft_length=told.length, within=self._within)
        self._model.begin(start)
        return Fallback(self._model, NgramDraft(told.length), timeout=told.timeout, on_loss=lost)
