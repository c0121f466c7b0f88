"""Plots of sweeps, with matplotlib (extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specpair.bench.comparison import Comparison
from specpair.bench.sweeps import Point, Sweep

__all__ = ["plot_comparison", "plot_sweep"]

_AXES = {
    "draft-length": "draft length",
    "sessions": "sessions at a time",
    "context": "tokens of the prompt",
    "temperature": "temperature",
    "delay": "round trip, ms",
    "proposer": "proposer",
}


def plot_sweep(sweep: Sweep, directory: Path) -> Path:
    """Tokens per second by what was varied; by sessions also the latency of a token. Returns the file's path."""
    latency = sweep.name == "sessions"
    figure = Figure(figsize=(9.6 if latency else 4.8, 3.6), layout="constrained")
    axes = list(figure.subplots(1, 2 if latency else 1, squeeze=False)[0])
    _lines(axes[0], sweep)
    axes[0].set(xlabel=_AXES[sweep.name], ylabel="tokens/s", ylim=(0, None))
    if latency:
        for series, points in _series(sweep).items():
            for name, values in (
                ("p50", [point.figures.p50_ms_per_token for point in points]),
                ("p99", [point.figures.p99_ms_per_token for point in points]),
            ):
                axes[1].plot([point.value for point in points], values, marker="o", label=f"{series} {name}")
        axes[1].set(xlabel=_AXES[sweep.name], ylabel="ms per token of a session", ylim=(0, None))
    for one in axes:
        _finish(one)
    return _save(figure, directory / f"{sweep.name}.svg")


def plot_comparison(comparisons: Sequence[Comparison], directory: Path) -> Path:
    """Measured speed-up and theory by draft length. Returns the file's path."""
    figure = Figure(figsize=(4.8, 3.6), layout="constrained")
    axes = figure.subplots()
    fixed = [one for one in comparisons if isinstance(one.draft_length, int)]
    axes.plot([one.draft_length for one in fixed], [one.measured for one in fixed], marker="o", label="measured")
    serial = [(one.draft_length, one.serial) for one in fixed if one.serial is not None]
    pipelined = [(one.draft_length, one.pipelined) for one in fixed if one.pipelined is not None]
    for points, style, label in ((serial, ":", "theory, serial"), (pipelined, "--", "theory, pipelined")):
        axes.plot([length for length, _ in points], [value for _, value in points], linestyle=style, label=label)
    for one in comparisons:
        if one.draft_length == "auto":
            axes.axhline(one.measured, color="grey", linewidth=1, label="measured, auto")
    axes.set(xlabel="draft length", ylabel="speed-up over the target alone", ylim=(0, None))
    _finish(axes)
    return _save(figure, directory / "theory.svg")


def _lines(axes: Axes, sweep: Sweep) -> None:
    """Numbers on a line by series, words as bars."""
    for series, points in _series(sweep).items():
        speeds = [point.figures.tokens_per_second for point in points]
        axes.plot([point.value for point in points], speeds, marker="o", label=series or None)
    words = [point for point in sweep.points if isinstance(point.value, str)]
    if len(words) == len(sweep.points):
        axes.bar([str(point.value) for point in words], [point.figures.tokens_per_second for point in words])
        return
    for point, style in zip(words, ("-", "--", ":", "-."), strict=False):
        axes.axhline(point.figures.tokens_per_second, color="grey", linestyle=style, label=str(point.value))


def _series(sweep: Sweep) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in sweep.points:
        if not isinstance(point.value, str):
            found.setdefault(point.series, []).append(point)
    return found


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path
