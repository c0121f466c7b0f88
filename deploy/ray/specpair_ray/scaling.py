"""How many replicas there should be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

__all__ = ["BySlots"]


class BySlots:
    """As many replicas as it takes for the slots in use to be no more than a share of all.

    A session holds a slot from its first message to its last, so slots in use are the load; requests of the kind that
    Serve counts there are none. Serve averages over time, waits before it acts, and stays within its bounds.
    """

    def __init__(self, use: float) -> None:
        self._use = use

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas, of which Serve takes the next whole number, and nothing to remember."""
        metrics = ctx.aggregated_metrics or {}
        slots = [count for count in metrics.get("slots", {}).values() if count > 0]
        if not slots:
            return ctx.target_num_replicas, {}  # nobody has said anything yet
        return sum(metrics.get("slots_in_use", {}).values()) / (self._use * max(slots)), {}
