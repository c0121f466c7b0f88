"""The goals: ratios that are measured side by side, and what each of them is to be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

__all__ = ["GOALS", "Goal", "Measured", "gather", "goals_object", "markdown", "table"]


@dataclass(frozen=True)
class Goal:
    """What is to be reached on a CPU."""

    name: str
    wanted: float
    at_least: bool = True
    unit: str = ""


GOALS: Mapping[int, Goal] = {
    1: Goal("pair / transformers assisted generation, 5 proposals a round", 3.0),
    2: Goal("pair / transformers generate, at acceptance 0.7", 6.0),
    3: Goal("pair / fastest other program with a draft, on the same cores", 1.2),
    4: Goal("target alone / target alone with the model's own layers, eager", 2.0),
    5: Goal("speed-up of the pair / theory, pipelined", 0.9),
    6: Goal("wire and client per round, median", 1.0, at_least=False, unit="ms"),
    7: Goal("tokens/s at 50 ms round trip / at 0, acceptance 0.8", 0.6),
    8: Goal("throughput of 8 sessions / of 1", 3.5),
    9: Goal("step at 4096 cache positions / at 512, 256 in use", 1.05, at_least=False),
    10: Goal("speculation at acceptance 0, or lookup with nothing to find / target alone", 0.97),
    11: Goal("equality of tokens, whoever proposes", 1.0),
    12: Goal("second start / first start, compiled", 0.3, at_least=False),
}


@dataclass(frozen=True)
class Measured:
    """What came of one goal."""

    number: int
    value: float
    detail: str = ""
    """What the value is made of."""

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        goal = GOALS[self.number]
        return self.value >= goal.wanted if goal.at_least else self.value <= goal.wanted


def gather(results: Path) -> dict[int, dict[str, object]]:
    """What the files of the parts say about each goal, the newest file where several do, with its part and date.

    Equality is a matter of all parts: it is the least of what they say.
    """
    found: dict[int, dict[str, object]] = {}
    reports = []
    for path in results.glob("part_*.json"):
        reports.append((path.stem.removeprefix("part_"), json.loads(path.read_text(encoding="utf-8"))))
    for part, report in sorted(reports, key=lambda one: one[1]["date"]):
        for one in report.get("goals", ()):
            measured = Measured(one["number"], one["value"], one["detail"])
            earlier = found.get(measured.number)
            if measured.number == 11 and earlier is not None and float(str(earlier["value"])) < measured.value:
                continue
            found[measured.number] = {
                "value": measured.value,
                "met": measured.met,
                "detail": measured.detail,
                "part": part,
                "date": report["date"],
            }
    return found


def goals_object(found: Mapping[int, Mapping[str, object]], reasons: Mapping[int, str]) -> list[dict[str, object]]:
    """All goals as the JSON has them; `reasons` says why one was not measured."""
    rows = []
    for number, goal in GOALS.items():
        wanted = {"number": number, "name": goal.name, "wanted": goal.wanted, "at_least": goal.at_least}
        rows.append({**wanted, **(found.get(number) or {"skipped": reasons.get(number, "not measured yet")})})
    return rows


def markdown(rows: Sequence[Mapping[str, object]], facts: Mapping[str, object]) -> str:
    """The table as a page, with what it was measured on."""
    lines = ["# The goals, measured", "", *(f"* {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| # | ratio | goal | measured | | of |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append("| " + " | ".join(_cells(row)) + " |")
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Mapping[str, object]]) -> Table:
    """What is printed."""
    result = Table(title="goals", title_justify="left")
    for heading in ("#", "ratio", "goal", "measured", "", "of"):
        result.add_column(heading)
    for row in rows:
        result.add_row(*_cells(row))
    return result


def _cells(row: Mapping[str, object]) -> list[str]:
    goal = GOALS[int(str(row["number"]))]
    wanted = f"{'≥' if goal.at_least else '≤'} {goal.wanted:g} {goal.unit}".strip()
    if "value" not in row:
        return [str(row["number"]), goal.name, wanted, "", "not measured", str(row["skipped"])]
    value = f"{float(str(row['value'])):.2f} {goal.unit}".strip()
    return [str(row["number"]), goal.name, wanted, value, "met" if row["met"] else "not met", str(row["detail"])]
