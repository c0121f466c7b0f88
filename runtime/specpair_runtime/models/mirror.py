"""The same calls on every process that holds a part of the model: rank 0 tells, the others follow.

A forward pass of a split model is made by all processes together, each with its own heads and its own slots' KV of
them. What is computed follows from a few integers: which call, which slots, which token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from transformers import PreTrainedModel

from specpair_runtime.models.ranks import Ranks
from specpair_runtime.models.runner import ModelRunner

__all__ = ["LeadingRunner", "dismiss", "follow"]


class _Call(IntEnum):
    LEAVE = 0
    LOGITS = 1
    EAGER_LOGITS = 2
    REFERENCE_LOGITS = 3
    PREFILL = 4


class LeadingRunner(ModelRunner):
    """Rank 0's runner. Its calls raise UnavailableError as soon as one of them has failed."""

    def __init__(self, ranks: Ranks, model: PreTrainedModel, **options: Any) -> None:  # noqa: ANN401
        super().__init__(model, **options)
        self._ranks = ranks

    def logits(self, first_slot: int, token_ids: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
        with self._ranks.calling(_step(_Call.LOGITS, first_slot, token_ids, starts, length)):
            return super().logits(first_slot, token_ids, starts, length)

    def eager_logits(self, first_slot: int, token_ids: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
        with self._ranks.calling(_step(_Call.EAGER_LOGITS, first_slot, token_ids, starts, length)):
            return super().eager_logits(first_slot, token_ids, starts, length)

    def reference_logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        with self._ranks.calling([_Call.REFERENCE_LOGITS, len(token_ids), *token_ids.flatten().tolist()]):
            return super().reference_logits(token_ids)

    def prefill(self, slot: int, token_ids: Sequence[int], start: int) -> None:
        with self._ranks.calling([_Call.PREFILL, slot, start, *token_ids]):
            super().prefill(slot, token_ids, start)


def follow(runner: ModelRunner, ranks: Ranks) -> None:
    """Makes the calls that rank 0 makes, until it dismisses this process."""
    while True:
        call, *given = ranks.receive()
        match call:
            case _Call.LEAVE:
                return
            case _Call.PREFILL:
                slot, start, *prompt = given
                runner.prefill(slot, prompt, start)
            case _Call.REFERENCE_LOGITS:
                runner.reference_logits(torch.tensor(given[1:]).view(given[0], -1))
            case _:
                first_slot, length, batch, *numbers = given
                token_ids, starts = torch.tensor(numbers[:-batch]).view(batch, -1), torch.tensor(numbers[-batch:])
                run = runner.logits if call == _Call.LOGITS else runner.eager_logits
                run(first_slot, token_ids, starts, length)


def dismiss(ranks: Ranks) -> None:
    """Ends the processes that follow."""
    ranks.close([_Call.LEAVE])


def _step(call: _Call, first_slot: int, token_ids: torch.Tensor, starts: torch.Tensor, length: int) -> list[int]:
    return [call, first_slot, length, len(token_ids), *token_ids.flatten().tolist(), *starts.tolist()]
