"""Draws the panels of a Grafana dashboard from what a Prometheus server has, without Grafana.

    .venv/bin/python tools/draw_dashboard.py --prometheus http://127.0.0.1:9090 --minutes 10 docs/images/dashboard.png

Every panel's own queries are asked, so a picture shows what they find; how Grafana would look is not what it shows.
Needs matplotlib (extra `bench`).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

DASHBOARD = Path(__file__).parents[1] / "deploy/grafana/dashboards/specpair.json"
# Inches of one of a dashboard's 24 columns and of one of its rows, and the height of a row's title in rows.
_COLUMN, _ROW, _TITLE = 0.66, 0.32, 1
_MOST_IN_LEGEND = 8
# Seconds that a rate is taken over at least.
_LEAST_WINDOW = 30


@dataclass(frozen=True)
class Series:
    """One line: Unix seconds and values, NaN where there is none."""

    label: str
    labels: Mapping[str, str]
    times: Sequence[float]
    values: Sequence[float]


class Source:
    """A Prometheus server, asked for the last seconds of a time."""

    def __init__(self, url: str, seconds: float, step: float) -> None:
        self._url = url.rstrip("/")
        self._end = time.time()
        self._begin = self._end - seconds
        self._step = step
        # A proxy that the surroundings name is not for loopback.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @property
    def span(self) -> tuple[datetime, datetime]:
        """From when to when."""
        return datetime.fromtimestamp(self._begin), datetime.fromtimestamp(self._end)

    def ask(self, query: str, legend: str) -> list[Series]:
        """What a query of the dashboard finds. Raises OSError when the server does not answer."""
        window = f"{max(round(4 * self._step), _LEAST_WINDOW)}s"
        query = query.replace("$__rate_interval", window).replace("$instance", ".*")
        parameters = {"query": query, "start": self._begin, "end": self._end, "step": self._step}
        with self._opener.open(f"{self._url}/api/v1/query_range?{urllib.parse.urlencode(parameters)}") as answer:
            found = json.load(answer)["data"]["result"]
        return [self._series(one["metric"], one["values"], legend) for one in found]

    def _series(self, labels: Mapping[str, str], points: Sequence[tuple[float, str]], legend: str) -> Series:
        known = {round((moment - self._begin) / self._step): float(value) for moment, value in points}
        steps = range(round((self._end - self._begin) / self._step) + 1)
        label = re.sub(r"\{\{(\w+)\}\}", lambda name: labels.get(name[1], ""), legend)
        return Series(
            " ".join(label.split()),
            labels,
            [self._begin + step * self._step for step in steps],
            [known.get(step, math.nan) for step in steps],
        )


def main() -> None:
    """Reads the command line, draws, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="the picture, .png or .svg")
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--step", type=float, default=5.0, help="seconds between two points")
    given = parser.parse_args()
    dashboard = json.loads(given.dashboard.read_text())
    figure = draw(dashboard, Source(given.prometheus, given.minutes * 60, given.step))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.output, dpi=90, facecolor=figure.get_facecolor())


def draw(dashboard: Mapping[str, Any], source: Source) -> Figure:
    """The whole dashboard, its panels where it has them."""
    panels = dashboard["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) + 2
    with mpl.rc_context({"font.size": 8, "axes.titlesize": 9, "axes.titleweight": "bold"}):
        figure = Figure(figsize=(24 * _COLUMN, height * _ROW), facecolor="#f4f5f5")
        begin, end = source.span
        title = f"{dashboard['title']}, {begin:%Y-%m-%d %H:%M:%S} to {end:%H:%M:%S}"
        figure.text(0.01, 1 - 0.7 / height, title, fontsize=13, weight="bold", va="center")
        for panel in panels:
            _place(figure, panel, source, height)
    return figure


def _place(figure: Figure, panel: Mapping[str, Any], source: Source, height: float) -> None:
    at = panel["gridPos"]
    top = 1 - (at["y"] + 1.3) / height
    if panel["type"] == "row":
        figure.text(0.01, top - 0.5 * _TITLE / height, panel["title"], fontsize=11, weight="bold", va="center")
        return
    axes = figure.add_axes(
        (
            (at["x"] + 1.3) / 24,
            top - (at["h"] - 0.9) / height,
            (at["w"] - 1.8) / 24,
            (at["h"] - 2.6) / height,
        ),
        facecolor="white",
    )
    axes.set_title(panel["title"], loc="left")
    found = [one for target in panel["targets"] for one in source.ask(target["expr"], target["legendFormat"])]
    found.sort(key=lambda one: one.label)
    defaults = panel["fieldConfig"]["defaults"]
    if not any(math.isfinite(value) for one in found for value in one.values):
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="#888888")
    elif panel["type"] == "heatmap":
        _draw_heatmap(axes, found)
    else:
        _draw_lines(axes, found, stacked=defaults["custom"]["stacking"]["mode"] == "normal")
        axes.yaxis.set_major_formatter(_formatter(defaults["unit"]))
        axes.set_ylim(bottom=defaults.get("min"), top=defaults.get("max"))
    axes.set_xlim(*source.span)
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_lines(axes: Axes, found: Sequence[Series], *, stacked: bool) -> None:
    times = [datetime.fromtimestamp(moment) for moment in found[0].times]
    if stacked:
        values = [[value if math.isfinite(value) else 0.0 for value in one.values] for one in found]
        axes.stackplot(times, *values, labels=[one.label for one in found], alpha=0.75, linewidth=0)
    else:
        for one in found:
            axes.plot(times, one.values, label=one.label, linewidth=1.1)
    columns = 2 if len(found) > _MOST_IN_LEGEND // 2 else 1
    axes.legend(loc="upper left", fontsize=6.5, framealpha=0.7, ncols=columns)


def _draw_heatmap(axes: Axes, found: Sequence[Series]) -> None:
    """Buckets are cumulative, as Prometheus has them."""
    buckets = sorted(found, key=lambda one: float(one.labels["le"]))
    counts = [
        [max(value - below, 0.0) for value, below in zip(one.values, before, strict=True)]
        for one, before in zip(buckets, [[0.0] * len(buckets[0].values), *(b.values for b in buckets)], strict=False)
    ]
    times = [datetime.fromtimestamp(moment) for moment in buckets[0].times]
    axes.pcolormesh(times, range(len(buckets)), counts, cmap="Oranges", shading="nearest")
    axes.set_yticks(range(len(buckets)), [f"{float(one.labels['le']):g}" for one in buckets], fontsize=6)


def _formatter(unit: str) -> EngFormatter | FuncFormatter:
    if unit == "percentunit":
        return FuncFormatter(lambda value, _: f"{value:.0%}")
    return EngFormatter(unit="s", sep=" ") if unit == "s" else FuncFormatter(lambda value, _: f"{value:g}")


if __name__ == "__main__":
    main()
