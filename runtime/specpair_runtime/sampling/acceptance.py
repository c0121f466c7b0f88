"""How much of a block is accepted."""

from __future__ import annotations

import torch

__all__ = ["accepted_lengths", "leading"]


def accepted_lengths(choices: torch.Tensor, proposed: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The coupled rule: how many leading proposals say what the target itself chooses, [batch], int64.

    `choices` is [batch, width]: the target's choice after the last committed token and after each proposal.
    `proposed` is [batch, width - 1], of which row b holds `counts[b]` proposals and padding.
    """
    return leading(choices[:, :-1] == proposed, counts)


def leading(accepted: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Length of the run of True at the start of each row, at most `counts`; `accepted` is [batch, proposals], bool."""
    columns = torch.arange(accepted.shape[1], device=accepted.device)
    return (accepted & (columns < counts[:, None])).long().cumprod(dim=1).sum(dim=1)
