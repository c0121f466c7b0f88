"""Sessions with all that their verdicts say, and a proposer that is at times right, nearly right, or wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from specpair.v1.common_pb2 import FinishReason
from specpair_runtime.sampling.logprobs import PositionLogprobs
from specpair_runtime.sampling.rejection import SparseProbs
from specpair_target.engine import Engine
from specpair_target.sessions import TurnOptions
from specpair_target.verifier import Judgement

from ..tiny import VOCABULARY, Reference
from .driving import open_session


@dataclass(frozen=True)
class Round:
    """A block behind the tokens of its session, and what the target said to it."""

    tokens: list[int]
    proposal: list[int]
    draft_probs: list[SparseProbs]
    judgement: Judgement


@dataclass
class Told:
    """What a session was told, from its start to the end of its turn."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: FinishReason.ValueType = FinishReason.FINISH_REASON_UNSPECIFIED
    rounds: list[Round] = field(default_factory=list)


class Guesser:
    """Proposes ids of any length. It knows the `truth`, a session's tokens, and ids that are `likely` behind some
    tokens. Under the rejection rule it makes up what it sampled from, or says that it is certain.
    """

    def __init__(
        self,
        truth: Sequence[int],
        seed: int,
        rejection: bool = False,
        likely: Callable[[Sequence[int]], Sequence[int]] = lambda tokens: (),
    ) -> None:
        self._truth, self._rejection, self._likely = truth, rejection, likely
        self._random = random.Random(seed)

    def __call__(self, tokens: Sequence[int], most: int) -> tuple[list[int], list[SparseProbs]]:
        right, certain = self._random.choice((0.3, 0.8, 1.0)), self._random.random() < 0.3
        ids: list[int] = []
        draft_probs: list[SparseProbs] = []
        for _ in range(self._random.randint(0, most)):
            before = [*tokens, *ids]
            others = [*self._likely(before), self._random.randrange(VOCABULARY)]
            is_right = len(before) < len(self._truth) and self._random.random() < right
            ids.append(self._truth[len(before)] if is_right else self._random.choice(others))
            if self._rejection and not certain:
                draft_probs.append(self._distribution({ids[-1], *others}))
        return ids, draft_probs

    def _distribution(self, support: Collection[int]) -> SparseProbs:
        weights = [self._random.random() + 0.05 for _ in support]
        return SparseProbs(sorted(support), [weight / sum(weights) for weight in weights])


def silent(tokens: Sequence[int], most: int) -> tuple[list[int], list[SparseProbs]]:
    """A guesser that proposes nothing, ever."""
    return [], []


def most_probable(prompt: Sequence[int], heard: Told) -> Callable[[Sequence[int]], Sequence[int]]:
    """What a draft as good as the target, but without its noise, finds likely along what a session said."""
    ids = {len(prompt) + place: [id_ for id_, _ in known.top] for place, known in enumerate(heard.logprobs)}
    return lambda tokens: ids.get(len(tokens), ())


def best_of(reference: Reference) -> Callable[[Sequence[int]], Sequence[int]]:
    """The two most probable ids behind any tokens, as transformers computes them."""
    return lambda tokens: reference.logits(tokens).topk(2).indices.tolist()


async def told(
    engine: Engine,
    prompt: Sequence[int],
    options: TurnOptions,
    guesser: Guesser = silent,
    committed: Sequence[int] = (),
) -> Told:
    """A session from its start to the end of its turn."""
    session = await open_session(engine, prompt, options, committed)
    heard = Told()
    try:
        while not heard.finish_reason:
            tokens = list(session.tokens)
            ids, draft_probs = guesser(tokens, engine.width - 1)
            verification = await engine.verify(session, ids, draft_probs)
            heard.rounds.append(Round(tokens, ids, draft_probs, verification.judgement))
            commit = verification.commit
            heard.token_ids += commit.token_ids
            heard.logprobs += commit.logprobs
            heard.finish_reason = commit.finish_reason
    finally:
        engine.close(session)
    return heard
