"""Driving a target engine as its servicer does, with proposers of every kind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from specpair.v1.common_pb2 import FinishReason
from specpair_runtime.sampling.params import SamplingParams
from specpair_target.engine import Engine
from specpair_target.prompts import Prompt
from specpair_target.sessions import Session, TurnOptions

from ..tiny import VOCABULARY

Result = TypeVar("Result")
# What a proposer is asked: the session's tokens, and how many ids a block carries at most.
Propose = Callable[[Sequence[int], int], Sequence[int]]


@dataclass
class Output:
    """What a session said, and in how many rounds."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: FinishReason.ValueType = FinishReason.FINISH_REASON_UNSPECIFIED
    stop_string: str = ""
    rounds: int = 0
    accepted: int = 0
    # Bits of keys and values of all layers, [positions, ...], for the tokens whose KV the slot held in the end.
    kv: torch.Tensor | None = None

    @property
    def text(self):
        return "".join(self.texts)


def nobody(tokens: Sequence[int], most: int) -> Sequence[int]:
    """Proposes nothing, ever."""
    return ()


class Oracle:
    """Proposes what comes next; all but a `share` of the ids are replaced by others at random.

    The lengths of its proposals go round from 0 to the most that a block carries.
    """

    def __init__(self, truth: Sequence[int], share: float = 1.0, vocabulary: int = VOCABULARY) -> None:
        self._truth, self._share, self._vocabulary = truth, share, vocabulary
        self._random = random.Random(len(truth))
        self._rounds = 0

    def __call__(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        count = self._rounds % (most + 1)
        self._rounds += 1
        return [self._said(id_) for id_ in self._truth[len(tokens) : len(tokens) + count]]

    def _said(self, true_id: int) -> int:
        if self._random.random() < self._share:
            return true_id
        return (true_id + self._random.randrange(1, self._vocabulary)) % self._vocabulary


# How each kind of proposer is made for a session whose tokens will be the given ones.
PROPOSERS: dict[str, Callable[[Sequence[int]], Propose]] = {
    "nobody": lambda truth: nobody,
    "oracle": Oracle,
    "half": lambda truth: Oracle(truth, share=0.5),
    "liar": lambda truth: Oracle(truth, share=0.0),
}


def greedy(max_new_tokens: int | None = None, **options: object) -> TurnOptions:
    return TurnOptions(max_new_tokens=max_new_tokens, **options)


def sampled(max_new_tokens: int, **params: object) -> TurnOptions:
    return TurnOptions(sampling=SamplingParams(**params), max_new_tokens=max_new_tokens)


async def open_session(
    engine: Engine, prompt: Sequence[int], options: TurnOptions, committed: Sequence[int] = ()
) -> Session:
    return await engine.open(Prompt(list(prompt)), committed, options, committed_field="committed")


async def round_of(engine: Engine, session: Session, proposal: Sequence[int], output: Output) -> None:
    """One block and its verdict."""
    verification = await engine.verify(session, proposal)
    commit = verification.commit
    output.token_ids += commit.token_ids
    output.texts += commit.texts
    output.finish_reason, output.stop_string = commit.finish_reason, commit.stop_string
    output.rounds += 1
    output.accepted += verification.judgement.accepted


async def speak(
    engine: Engine,
    prompt: Sequence[int],
    options: TurnOptions,
    propose: Propose = nobody,
    committed: Sequence[int] = (),
    keep_kv: bool = False,
) -> Output:
    """A session from its start to the end of its turn."""
    session = await open_session(engine, prompt, options, committed)
    output = Output()
    try:
        while not output.finish_reason:
            await round_of(engine, session, propose(session.tokens, engine.width - 1), output)
        if keep_kv:
            output.kv = kv_of(engine, session)
    finally:
        engine.close(session)
    return output


def kv_of(engine: Engine, session: Session) -> torch.Tensor:
    """Keys and values of a session's committed tokens over all layers, as integers: equal bits are equal numbers."""
    length = min(session.kv_length, session.length - 1)
    return slot_bits(engine, session.slot)[:, :, :length]


def slot_bits(engine: Engine, slot: int) -> torch.Tensor:
    """The bits of a whole slot, [layers and kinds, heads, positions, head_dim]."""
    layers = engine.model.runner._cache.layers
    # Keys may be kept as columns.
    keys = [layer.keys[slot].mT if layer.columns else layer.keys[slot] for layer in layers]
    both = torch.stack(
        [kind for pair in zip(keys, (layer.values[slot] for layer in layers), strict=True) for kind in pair]
    )
    return both.view({2: torch.int16, 4: torch.int32}[both.element_size()]).clone()


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Runs to the end, within a time that no test needs."""

    async def limited() -> Result:
        async with asyncio.timeout(60):
            return await coroutine

    return asyncio.run(limited())


def together(*coroutines: Coroutine[Any, Any, Result]) -> list[Result]:
    """The same for several at a time."""

    async def gathered() -> list[Result]:
        return await asyncio.gather(*coroutines)

    return run(gathered())
