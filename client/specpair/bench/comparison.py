"""Measured speed-ups beside those that theory gives for the measured acceptance and step costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specpair.bench.sweeps import Point, Sweep
from specpair.bench.theory import Costs, pipelined_speedup, serial_speedup

__all__ = ["Comparison", "best", "compare"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One draft length. Speed-ups are over the target alone, in decoding: from the first chunk to the last."""

    draft_length: int | str
    """ "auto" has no theory of its own."""
    measured: float
    acceptance_per_token: float | None = None
    draft_cost: float | None = None
    """Of one token, in plain steps of the target."""
    verify_cost: float | None = None
    """Of a block, in plain steps of the target."""
    serial: float | None = None
    pipelined: float | None = None

    @property
    def ratio(self) -> float | None:
        """Measured over pipelined."""
        return self.measured / self.pipelined if self.pipelined else None


def compare(sweep: Sweep, draft_token_seconds: float) -> tuple[Comparison, ...]:
    """Every point of the sweep `draft-length` beside theory; nothing on the wire counts, so that it shows as a loss."""
    alone = next(point for point in sweep.points if point.value == "alone").figures.decode_ms_per_token / 1e3
    return tuple(_one(point, alone, draft_token_seconds) for point in sweep.points if point.value != "alone")


def best(comparisons: Sequence[Comparison]) -> Comparison | None:
    """The fixed draft length of which theory expects most; None if nothing was proposed."""
    known = [one for one in comparisons if one.pipelined is not None]
    return max(known, key=lambda one: one.pipelined or 0.0) if known else None


def _one(point: Point, alone: float, draft: float) -> Comparison:
    figures = point.figures
    measured = 1e3 * alone / figures.decode_ms_per_token if figures.decode_ms_per_token else 0.0
    rate, length = figures.acceptance_per_token, point.value
    verify = figures.ms_per_round.get("verifying", 0.0) / 1e3
    if rate is None or not isinstance(length, int) or not verify or not alone:
        return Comparison(length if isinstance(length, int) else str(length), measured)
    costs = Costs(plain=alone, draft=draft, verify=verify)
    return Comparison(
        length,
        measured,
        rate,
        costs.draft / costs.plain,
        costs.verify / costs.plain,
        serial_speedup(rate, length, costs),
        pipelined_speedup(rate, length, costs),
    )
