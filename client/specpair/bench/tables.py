"""What `specpair bench` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from specpair.bench.comparison import Comparison
from specpair.bench.sweeps import Point, Sweep

__all__ = ["comparison_table", "sweep_table"]

_TITLES = {
    "draft-length": "by draft length",
    "proposer": "by proposer",
    "sessions": "by sessions at a time",
    "context": "by tokens of the prompt",
    "temperature": "by temperature",
    "delay": "by delay of a round trip, in ms",
}


def sweep_table(sweep: Sweep) -> Table:
    """One row per case."""
    result = Table(title=_TITLES[sweep.name], title_justify="left")
    result.add_column("", no_wrap=True)
    headings = ("tokens/s", "slowest", "fastest", "× alone", "ms/token p50", "p99", "accepted", "tokens/round")
    for heading in (*headings, "verify ms", "wire ms"):
        result.add_column(heading, justify="right")
    for point in sweep.points:
        result.add_row(*_cells(point))
    return result


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One row per draft length."""
    result = Table(title="speed-up of decoding over the target alone, beside theory", title_justify="left")
    result.add_column("k", justify="right", no_wrap=True)
    for heading in ("a per token", "draft cost", "verify cost", "serial", "pipelined", "measured", "measured/theory"):
        result.add_column(heading, justify="right")
    for one in comparisons:
        shown = (one.acceptance_per_token, one.draft_cost, one.verify_cost, one.serial, one.pipelined)
        result.add_row(str(one.draft_length), *map(_figure, (*shown, one.measured, one.ratio)))
    return result


def _cells(point: Point) -> list[str]:
    figures = point.figures
    value = f"{point.value:g}" if isinstance(point.value, float) else str(point.value)
    return [
        f"{point.series} {value}".strip() if point.series != "model" else value,
        f"{figures.tokens_per_second:.1f}",
        f"{figures.slowest:.1f}",
        f"{figures.fastest:.1f}",
        _figure(point.speedup),
        f"{figures.p50_ms_per_token:.2f}",
        f"{figures.p99_ms_per_token:.2f}",
        "" if figures.acceptance is None else f"{figures.acceptance:.0%}",
        f"{figures.tokens_per_round:.2f}",
        _figure(figures.ms_per_round.get("verifying")),
        _figure(figures.ms_per_round.get("wire")),
    ]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
