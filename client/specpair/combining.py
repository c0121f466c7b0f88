"""Lookups alone and beside a model: in each round whichever is expected to bring more tokens in the time."""

from __future__ import annotations

from collections.abc import Sequence

from specpair.lookup import Found, Lookup
from specpair.loop import Ask
from specpair.messages import Proposal
from specpair.pacing import Round
from specpair.proposers import Proposer, nothing
from specpair.yields import Yields

__all__ = ["Combined", "LookupDraft"]

# Plain steps behind a look that found nothing. They end as soon as a token makes another look worth while; where the
# moment of a look must not depend on times, they cannot.
_STEPS, _BLIND_STEPS = 64, 4


class LookupDraft:
    """Proposes what it finds: as many ids as have paid so far for matches of its kind, which may be none.

    `draft_length` is a fixed number of ids in place of that. `yields` goes on learning from turn to turn. How far the
    target has come when something turns up between two looks is a matter of time: `repeatable` lookups see it at the
    next look only.
    """

    name = "ngram"

    def __init__(
        self, lookup: Lookup, yields: Yields, draft_length: int | None = None, *, repeatable: bool = False
    ) -> None:
        self._lookup = lookup
        self._draft_length = draft_length
        self._repeatable = repeatable
        self._yields = yields
        # The kinds of the proposals whose verdicts are still to come, by round.
        self._kinds: dict[int, tuple[str, int]] = {}

    async def propose(self, ask: Ask) -> Proposal:
        return self.offer(ask, self._least) or nothing(ask, plain=_BLIND_STEPS if self._repeatable else _STEPS)

    def offer(self, ask: Ask, otherwise: float) -> Proposal | None:
        """A proposal, if it is expected to bring more than `otherwise` tokens in the time of a step."""
        guess = 1 if ask.ahead else 0
        if (chosen := self._best(ask.token_ids, ask.committed, ask.max_tokens, guess, otherwise)) is None:
            return None
        best, asked = chosen
        self._kinds[ask.round] = best.kind
        self._yields.proposed(best.kind)
        return Proposal(
            round=ask.round,
            base_length=len(ask.token_ids),
            token_ids=best.token_ids[: asked + guess],
            source=best.source,
            asked=asked,
        )

    def tempted(self, token_ids: Sequence[int], most: int) -> bool:
        return not self._repeatable and self._best(token_ids, len(token_ids), most, 0, self._least) is not None

    @property
    def _least(self) -> float:
        """Tokens that a round must bring to be worth more than plain steps."""
        return self._yields.plain if self._draft_length is None else 0.0

    def _best(
        self, token_ids: Sequence[int], committed: int, most: int, guess: int, otherwise: float
    ) -> tuple[Found, int] | None:
        """The find that is expected to bring most, if it brings enough, and how many of its ids."""
        most = most if self._draft_length is None else min(self._draft_length, most)
        if not most:
            return None
        best, best_goodput, asked = None, 0.0, 0
        for found in self._lookup.find(token_ids, committed, most + guess):
            k, goodput = self._yields.best_length(found.kind, min(most, len(found.token_ids)))
            if goodput > best_goodput:
                best, best_goodput, asked = found, goodput, k
        if best is None or not self._yields.pays(best.kind, best_goodput, otherwise):
            return None
        return best, asked if self._draft_length is None else most

    def observe(self, round: Round) -> None:
        if (kind := self._kinds.get(round.round)) is not None:
            self._yields.looked_up(kind, round)
        elif not round.asked:
            self._yields.stepped(round)
        # Verdicts come in the order of the rounds: of earlier ones, none will.
        self._kinds = {asked: kind for asked, kind in self._kinds.items() if asked > round.round}

    def made(self, round: int) -> bool:
        """Whether a round's block, still to be judged, was looked up here."""
        return round in self._kinds


class Combined:
    """A draft service's model and lookups beside it. A lookup costs no time, a model's proposal does.

    So a lookup is proposed where matches of its kind have brought more tokens in the time than rounds with the model
    have, and else the model is asked; a kind that has not is tried again now and then.
    """

    def __init__(self, model: Proposer, lookups: LookupDraft, yields: Yields) -> None:
        self._model = model
        self._lookups = lookups
        self._yields = yields

    @property
    def name(self) -> str:
        return self._model.name

    async def propose(self, ask: Ask) -> Proposal:
        if (found := self._lookups.offer(ask, self._yields.model)) is not None:
            return found
        return await self._model.propose(ask)

    def tempted(self, token_ids: Sequence[int], most: int) -> bool:
        return self._lookups.tempted(token_ids, most)

    def observe(self, round: Round) -> None:
        if not self._lookups.made(round.round):
            self._yields.modelled(round)
            self._model.observe(round)
        self._lookups.observe(round)
