"""Lookups alone and beside a model: in each round whichever is expected to bring more tokens in the time."""

from __future__ import annotations

from dataclasses import replace

from specpair.lookup import Lookup
from specpair.loop import Ask
from specpair.messages import Proposal
from specpair.pacing import Round
from specpair.proposers import Proposer, nothing
from specpair.yields import Yields

__all__ = ["Combined", "LookupDraft"]

# Tokens of a step of the target with no proposal.
_PLAIN = 1.0
# Plain steps between two looks at most.
_MOST_STEPS = 8


class LookupDraft:
    """Proposes what it finds: as many ids as have paid so far for matches of its kind, which may be none.

    `draft_length` is a fixed number of ids in place of that. `yields` goes on learning from turn to turn.
    """

    name = "ngram"

    def __init__(self, lookup: Lookup, yields: Yields, draft_length: int | None = None) -> None:
        self._lookup = lookup
        self._draft_length = draft_length
        self._yields = yields
        # The kinds of the proposals whose verdicts are still to come, by round.
        self._kinds: dict[int, tuple[str, int]] = {}
        self._in_vain = 0

    @property
    def patience(self) -> int:
        """Plain steps to take before the next look: the more, the longer nothing was found that pays."""
        return min(self._in_vain // 4, _MOST_STEPS)

    async def propose(self, ask: Ask) -> Proposal:
        otherwise = _PLAIN if self._draft_length is None else 0.0
        return self.offer(ask, otherwise) or nothing(ask, plain=self.patience)

    def offer(self, ask: Ask, otherwise: float) -> Proposal | None:
        """A proposal, if it is expected to bring more than `otherwise` tokens in the time of a step."""
        found = self._find(ask, otherwise)
        self._in_vain = 0 if found is not None else self._in_vain + 1
        return found

    def _find(self, ask: Ask, otherwise: float) -> Proposal | None:
        guess = 1 if ask.ahead else 0
        most = ask.max_tokens if self._draft_length is None else min(self._draft_length, ask.max_tokens)
        if not most:
            return None
        best, best_goodput, asked = None, 0.0, 0
        for found in self._lookup.find(ask.token_ids, ask.committed, most + guess):
            k, goodput = self._yields.best_length(found.kind, min(most, len(found.token_ids)))
            if goodput > best_goodput:
                best, best_goodput, asked = found, goodput, k
        if best is None or not self._yields.pays(best.kind, best_goodput, otherwise):
            return None
        if self._draft_length is not None:
            asked = most
        self._kinds[ask.round] = best.kind
        return Proposal(
            round=ask.round,
            base_length=len(ask.token_ids),
            token_ids=best.token_ids[: asked + guess],
            source=best.source,
            asked=asked,
        )

    def observe(self, round: Round) -> None:
        if (kind := self._kinds.get(round.round)) is not None:
            self._yields.looked_up(kind, round)
        # Verdicts come in the order of the rounds: of earlier ones, none will.
        self._kinds = {asked: kind for asked, kind in self._kinds.items() if asked > round.round}

    def made(self, round: int) -> bool:
        """Whether a round's block, still to be judged, was looked up here."""
        return round in self._kinds


class Combined:
    """A draft service's model and lookups beside it. A lookup costs no time, a model's proposal does.

    So a lookup is proposed where matches of its kind have brought more tokens in the time than rounds with the model
    have, and else the model is asked; a kind that has not is tried again now and then. `model` goes on with `lookups`
    alone by itself when the draft service is lost, and has another name from then on.
    """

    def __init__(self, model: Proposer, lookups: LookupDraft, yields: Yields) -> None:
        self._model = model
        self._lookups = lookups
        self._yields = yields

    @property
    def name(self) -> str:
        return self._model.name

    async def propose(self, ask: Ask) -> Proposal:
        if self.name == self._lookups.name:
            return await self._lookups.propose(ask)
        if (found := self._lookups.offer(ask, self._yields.model)) is not None:
            return found
        answer = await self._model.propose(ask)
        return replace(answer, plain=min(answer.plain, self._lookups.patience)) if answer.plain else answer

    def observe(self, round: Round) -> None:
        if not self._lookups.made(round.round):
            self._yields.modelled(round)
            self._model.observe(round)
        self._lookups.observe(round)
