"""The clock that time limits and pauses of a client go by."""

from __future__ import annotations

import asyncio

__all__ = ["loop_time"]


def loop_time() -> float:
    """Seconds on the running event loop's clock, from anywhere: the clock of asyncio's own time limits."""
    return asyncio.get_running_loop().time()
