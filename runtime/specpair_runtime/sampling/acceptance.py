"""The coupled acceptance rule: a proposal is accepted as long as it says what the target itself chooses."""

from __future__ import annotations

import torch

__all__ = ["accepted_lengths"]


def accepted_lengths(choices: torch.Tensor, proposed: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """How many leading proposals of each block the target agrees with, [batch], int64.

    `choices` is [batch, width]: the target's choice after the last committed token and after each proposal.
    `proposed` is [batch, width - 1], of which row b holds `counts[b]` proposals and padding.
    """
    columns = torch.arange(proposed.shape[1], device=proposed.device)
    agreed = (choices[:, :-1] == proposed) & (columns < counts[:, None])
    return agreed.long().cumprod(dim=1).sum(dim=1)
