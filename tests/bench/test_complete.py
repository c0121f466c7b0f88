"""The complete benchmark: its options, the table of goals, and a part of it on the demo pair."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from .loading import ROOT, scripts

MODULES = (
    *("measuring", "report", "specpair_loops", "goals", "settings", "part", "yardstick_part", "client_parts"),
    *("service_parts", "complete"),
)


@pytest.fixture(scope="module")
def bench():
    with scripts(*(f"bench/{name}" for name in MODULES)) as found:
        yield found


def test_every_goal_has_a_part(bench):
    """Each of the twelve goals is decided by exactly one part, and one that only runs on request decides none."""
    complete = bench["complete"]
    decided = [number for _, numbers in complete.PARTS.values() for number in numbers]
    assert sorted(decided) == list(bench["goals"].GOALS) == list(range(1, 13))
    assert not any(complete.PARTS[name][1] for name in complete._EXTRA)


def test_options(bench):
    """Parts keep their order; `goals` are all that decide one; flags of other programs are passed on."""
    parse, parts = bench["complete"].parse, bench["complete"].PARTS
    assert parse([]).parts == tuple(name for name in parts if name != "large")
    assert parse(["--only", "delay", "lean"]).parts == ("lean", "delay")
    assert set(parse(["--only", "goals"]).parts) == {name for name, (_, numbers) in parts.items() if numbers}
    settings = parse(["--llama-dir", "d", "--quick", "--target-threads", "2"]).settings
    assert (settings.peers, settings.repeats, settings.target_threads) == (("--llama-dir", "d"), 1, 2)
    assert bench["complete"]._plain(settings)["peers"] == ["--llama-dir"]
    with pytest.raises(SystemExit, match="2"):
        parse(["--only", "moon"])


def test_a_part_that_is_done_is_known(bench, tmp_path):
    """By its settings: a file of other settings, or none, is not the part."""
    complete, settings = bench["complete"], bench["settings"].Settings()
    path = tmp_path / "part.json"
    assert not complete._is_done(path, settings)
    path.write_text(json.dumps({"settings": complete._plain(settings)}))
    assert complete._is_done(path, settings)
    assert not complete._is_done(path, dataclasses.replace(settings, repeats=7))
    path.write_text("{")
    assert not complete._is_done(path, settings)


@pytest.mark.parametrize(
    ("number", "value", "met"), [(1, 3.0, True), (1, 2.99, False), (6, 1.0, True), (9, 1.06, False), (12, 0.1, True)]
)
def test_goals_are_met_from_their_side(bench, number, value, met):
    """Some are to be reached, some not to be exceeded."""
    assert bench["goals"].Measured(number, value).met is met


def test_the_yardstick_decides_three_goals(bench):
    """The pair over assisted generation, over plain generation, and over the faster of the other programs."""
    speeds = {"generate": 10, "generate-assisted": 20, "llama-draft": 30, "openvino-draft": 40, "specpair-pair": 60}
    loops = {name: {"tokens_per_second": speed, "acceptance_per_token": None} for name, speed in speeds.items()}
    found = bench["yardstick_part"].decided(loops)
    assert [(one.number, one.value) for one in found] == [(1, 3.0), (2, 6.0), (3, 1.5)]
    assert "openvino-draft 40" in found[2].detail
    del loops["llama-draft"], loops["openvino-draft"]
    assert [one.number for one in bench["yardstick_part"].decided(loops)] == [1, 2]
    del loops["specpair-pair"]
    assert bench["yardstick_part"].decided(loops) == []


def test_goals_are_gathered_from_all_parts(bench, tmp_path):
    """The newest figure counts, but of equality the worst; what was not measured says why; every goal has a row."""
    goals = bench["goals"]

    def part(name, date, *found):
        told = [{"number": number, "value": value, "detail": name} for number, value in found]
        (tmp_path / f"part_{name}.json").write_text(json.dumps({"date": date, "goals": told}))

    part("old", "2026-01-01T00:00Z", (4, 1.5), (11, 0.0))
    part("new", "2026-01-02T00:00Z", (4, 2.5), (11, 1.0))
    found = goals.gather(tmp_path)
    assert (found[4]["value"], found[4]["met"], found[4]["part"]) == (2.5, True, "new")
    assert (found[11]["value"], found[11]["met"], found[11]["detail"]) == (0.0, False, "old")
    rows = goals.goals_object(found, {12: "no such flag"})
    assert [row["number"] for row in rows] == list(range(1, 13))
    assert rows[11]["skipped"] == "no such flag"
    assert rows[0]["skipped"] == "not measured yet"
    page = goals.markdown(rows, {"machine": "fast"})
    assert "| 4 | " + goals.GOALS[4].name + " | ≥ 2 | 2.50 | met | new |" in page
    assert page.count("\n| ") == 14
    assert goals.table(rows).row_count == 12


def test_services_get_a_parts_flags_behind_the_callers(bench):
    """The last flag of a name counts."""
    settings = bench["settings"].Settings(target_options="--slots 3 --compile on")
    flags = settings.services(ROOT / "m", "--slots 8").flags("target")
    assert flags[-4:] == ["--compile", "on", "--slots", "8"]


def test_pairs_are_made_once(bench, tmp_path, monkeypatch):
    """A pair with the factor that it should have is taken as it is; one that cannot be made skips the part."""
    settings = bench["settings"]
    monkeypatch.chdir(tmp_path)
    assert settings.models("demo", print) == settings.Path("models/demo")
    with pytest.raises(settings.SkippedError, match="cannot be made"):
        settings.models("pair-80", lambda _: None)
    place = tmp_path / "runs/bench/pair-80"
    place.mkdir(parents=True)
    (place / "pair.json").write_text(json.dumps({"factor": settings.PAIRS["pair-80"].factor}))
    assert settings.models("pair-80", lambda _: None).resolve() == place


@pytest.mark.skipif(not (ROOT / "models/demo/target").exists(), reason="models/demo is not there")
def test_a_part_on_the_demo_pair(bench, tmp_path, monkeypatch):
    """Services start, sweeps run, tokens agree, and figures and plots' message come back."""
    monkeypatch.chdir(ROOT)
    told = []
    settings = bench["settings"].Settings(repeats=1, prompts=1, max_new_tokens=8, results=tmp_path)
    part = asyncio.run(bench["client_parts"].sweep("proposer", pair="demo")(settings, told.append))
    assert {"alone", "ngram", "model"} <= {point["value"] for point in part.figures["sweeps"]["proposer"]["points"]}
    assert [(one.number, one.value) for one in part.goals] == [(11, 1.0)]
    assert part.figures["target"]["model"] == "target"
    assert told[-1].startswith(("plotted: proposer.svg", "no plots"))
