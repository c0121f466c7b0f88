"""What a client may know of an engine's failure, and when an engine is beyond help; the log has the rest."""

from __future__ import annotations

import torch

from specpair.errors import InternalError, OverloadedError, SpecpairError, UnavailableError

__all__ = ["fatal", "non_finite", "public"]

# Besides OutOfMemoryError, which the caching allocators of devices raise: a CPU's allocator, libraries' workspaces, and
# the driver itself raise a RuntimeError that only says so.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


def public(error: Exception) -> SpecpairError:
    """For what went wrong while a session was computed."""
    if _is_out_of_memory(error):
        return OverloadedError("the device is out of memory", reason="OUT_OF_MEMORY")
    return InternalError("the engine failed", reason="ENGINE_FAILED")


def fatal(error: Exception) -> bool:
    """Whether nothing can be computed any more: behind most of its errors a device refuses everything, and processes
    that share a model are out of step.
    """
    if isinstance(error, UnavailableError):
        return True
    return isinstance(error, torch.AcceleratorError) and not _is_out_of_memory(error)


def non_finite() -> SpecpairError:
    """For logits that say nothing."""
    return InternalError("the model's logits are not finite", reason="NON_FINITE_LOGITS")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
