"""What a client may know of an engine's failure; the log has the rest."""

from __future__ import annotations

import torch

from specpair.errors import InternalError, OverloadedError, SpecpairError

__all__ = ["non_finite", "public"]


def public(error: Exception) -> SpecpairError:
    """For what went wrong while a session was computed."""
    if isinstance(error, torch.OutOfMemoryError):
        return OverloadedError("the device is out of memory", reason="OUT_OF_MEMORY")
    return InternalError("the engine failed", reason="ENGINE_FAILED")


def non_finite() -> SpecpairError:
    """For logits that say nothing."""
    return InternalError("the model's logits are not finite", reason="NON_FINITE_LOGITS")
