"""The yardstick's arithmetic and options, and transformers' loops on a tiny pair."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .loading import ROOT, scripts

MODULES = (
    *("measuring", "report", "conversions", "transformers_loops", "llama_loops", "openvino_loops", "specpair_loops"),
    "yardstick",
)


@pytest.fixture(scope="module")
def bench():
    """Modules of bench/ and tools/make_benchmark_pair by name."""
    tools = ("tools/pair_acceptance", "tools/make_benchmark_pair")
    with scripts(*(f"bench/{name}" for name in MODULES), *tools) as modules:
        yield modules


@pytest.fixture(scope="module")
def measuring(bench):
    return bench["measuring"]


class Scripted:
    """A loop that takes the seconds it is told to, one per call."""

    def __init__(self, measuring, name, seconds, calls=None, **generation):
        self.name = name
        self.draft_length = None
        self._make = lambda seconds: measuring.Generation(
            **{"token_ids": (1, 2, 3), "rounds": 3, **generation}, seconds=seconds
        )
        self._seconds = iter(seconds)
        self._calls = calls if calls is not None else []

    def run(self, prompt):
        self._calls.append((self.name, prompt[0]))
        return self._make(next(self._seconds))


def _silent(_):
    pass


def test_loops_take_turns(measuring):
    """Every loop runs once per prompt and repeat, and each turn begins with the next loop."""
    calls = []
    loops = [Scripted(measuring, name, [1.0] * 4, calls) for name in ("a", "b", "c")]
    runs = measuring.measure(loops, [[10], [20]], 2, _silent)
    assert calls == [
        *(("a", 10), ("b", 10), ("c", 10)),
        *(("b", 20), ("c", 20), ("a", 20)),
        *(("c", 10), ("a", 10), ("b", 10)),
        *(("a", 20), ("b", 20), ("c", 20)),
    ]
    assert {name: [len(one) for one in passes] for name, passes in runs.items()} == {name: [2, 2] for name in "abc"}


def test_speed_is_of_medians_by_prompt(measuring):
    """One disturbed run of each prompt, in different passes, changes the slowest pass and not the speed."""
    loop = Scripted(measuring, "a", [1.0, 9.0, 1.0, 2.0, 9.0, 2.0])
    summary = measuring.summarize(loop, measuring.measure([loop], [[1], [2]], 3, _silent)["a"])
    assert summary.tokens_per_second == pytest.approx(6 / (1.0 + 2.0))
    assert summary.slowest == pytest.approx(6 / 11)
    assert summary.fastest == pytest.approx(6 / 3)
    assert (summary.tokens_per_round, summary.acceptance, summary.acceptance_per_token) == (1.0, None, None)
    assert summary.milliseconds_per_round == {"whole": pytest.approx(500.0)}


def test_proposals_are_counted(measuring):
    """Acceptance is of the proposed tokens, and parts are by round."""
    loop = Scripted(measuring, "a", [1.0, 1.0], rounds=2, proposed=5, accepted=1, parts={"wire": 0.1})
    loop.draft_length = 2
    summary = measuring.summarize(loop, measuring.measure([loop], [[1]], 2, _silent)["a"])
    assert summary.acceptance == pytest.approx(0.2)
    assert summary.tokens_per_round == pytest.approx(1.5)
    assert summary.milliseconds_per_round == {"whole": pytest.approx(500.0), "wire": pytest.approx(50.0)}
    assert summary.acceptance_per_token == pytest.approx((3**0.5 - 1) / 2)  # a with 1 + a + a² = 1.5


def test_ratios_are_to_what_was_measured(measuring, bench):
    """Ratios are of speeds, to plain `generate` and to the target alone, each only if it ran."""
    speeds = {"generate": [2.0], "generate-static": [1.0], "specpair-alone": [4.0]}
    loops = [Scripted(measuring, name, seconds) for name, seconds in speeds.items()]
    runs = measuring.measure(loops, [[1]], 1, _silent)
    summaries = [measuring.summarize(loop, runs[loop.name]) for loop in loops]
    assert bench["yardstick"].ratios(summaries)["generate-static"] == {"to_generate": 2.0, "to_specpair-alone": 4.0}
    assert bench["yardstick"].ratios(summaries[1:]) == {
        "generate-static": {"to_specpair-alone": 4.0},
        "specpair-alone": {"to_specpair-alone": 1.0},
    }
    assert bench["yardstick"].table(summaries, {}).row_count == 3


def _runs(measuring, *passes):
    return [[measuring.Generation(tuple(tokens), 1.0, 1) for tokens in one_pass] for one_pass in passes]


def test_agreement_is_a_share(measuring):
    """Of two prompts, one equal and one different after the third of four tokens."""
    one, other = _runs(measuring, [[1, 2, 3, 4], [1, 2, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 9]])
    assert measuring.agreement(one, other) == {"prompts_equal": 0.5, "tokens_before_a_difference": 0.875}


def test_tokens_that_must_not_differ(measuring):
    """specpair's loops must agree always, transformers' with `generate` in fp32 alone."""
    same, other = _runs(measuring, [[1, 2]], [[1, 2]]), _runs(measuring, [[1, 3]], [[1, 3]])
    restless = _runs(measuring, [[1, 3]], [[1, 2]])
    differences = measuring.differences
    assert differences({"generate": same, "generate-static": same, "specpair-alone": same}, exact=True) == []
    assert differences({"generate": same, "generate-static": other}, exact=False) == []
    assert differences({"generate": same, "generate-static": other}, exact=True) == [
        "generate-static: not the tokens of generate"
    ]
    assert differences({"generate": same, "specpair-alone": other}, exact=False) == []
    assert differences({"specpair-alone": same, "specpair-pair": other}, exact=False) == [
        "specpair-pair: not the tokens of specpair-alone"
    ]
    assert differences({"specpair-alone": restless}, exact=False) == ["specpair-alone: not the same tokens every time"]
    assert differences({"generate": restless}, exact=False) == []


def test_defaults(bench):
    """Everything is measured but what takes minutes, transformers on a thread per core, each service on half."""
    options = bench["yardstick"].parse([])
    assert options.chosen == tuple(name for name in options.loops if name != "generate-compiled")
    assert {"llama-draft", "openvino-draft"} < set(options.chosen)
    assert [line.partition(":")[0] for line in options.skipped] == ["generate-compiled"]
    assert (options.cores, options.threads, options.target_threads, options.draft_threads) == (2, 2, 1, 1)
    assert options.json == Path("bench/results/yardstick_bf16.json")


def test_options(bench):
    """A GPU compiles without being told, loops come in the table's order, and threads follow cores."""
    parse = bench["yardstick"].parse
    assert parse(["--device", "cuda"]).skipped == ()
    assert parse(["--compile"]).skipped == ()
    assert parse(["--device", "cuda", "--no-compile"]).chosen == parse([]).chosen
    assert parse(["--loops", "specpair-pair", "generate"]).loops == ("generate", "specpair-pair")
    options = parse(["--dtype", "fp32", "--cores", "1", "--target-threads", "3", "--remarks", "one", "two"])
    assert (options.threads, options.target_threads, options.remarks) == (1, 3, ("one", "two"))
    assert options.json == Path("bench/results/yardstick_fp32.json")


@pytest.mark.parametrize("wrong", [["--loops", "other"], ["--repeats", "0"], ["--dtype", "int3"], ["--prompts", "x"]])
def test_wrong_options_are_refused(bench, capsys, wrong):
    """Options that cannot be used end the process as argparse does."""
    with pytest.raises(SystemExit, match="2"):
        bench["yardstick"].parse(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_services_get_their_flags(bench):
    """Each service its own model, threads and further options."""
    settings = bench["specpair_loops"].ServiceSettings(Path("m"), "bf16", "cpu", 2, 1, "--verify-width 4", "--slots 1")
    target, draft = settings.flags("target"), settings.flags("draft")
    assert target[target.index("--model") + 1] == str(Path("m/target"))
    assert target[target.index("--threads") + 1] == "2"
    assert target[-2:] == ["--verify-width", "4"]
    assert draft[draft.index("--threads") + 1] == "1"
    assert draft[-2:] == ["--slots", "1"]


def test_report_names_no_place_of_this_machine(bench, tmp_path, monkeypatch):
    """Paths in the command are relative, and figures come with date, versions and machine."""
    report = bench["report"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bench/y.py"), "--models", "/elsewhere/pair", "--prompts", "1"])
    path = tmp_path / "results/y.json"
    report.write_report(path, {"loops": {}}, {"machine": report.machine([0, 1])})
    written = json.loads(path.read_text())
    assert written["command"] == ["python", "bench/y.py", "--models", "pair", "--prompts", "1"]
    assert {"python", "torch", "transformers"} <= written["versions"].keys()
    assert written["machine"]["cores_used"] == 2
    assert written["date"].endswith("Z")


def test_other_work_is_seen(bench):
    """What this process and its children do is not other work; what the machine does besides is."""
    if not Path("/proc/stat").exists():
        assert bench["report"].OtherWork().cores() is None
        return
    other = bench["report"].OtherWork()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    assert 0.0 <= other.cores() <= os.cpu_count()


def test_processor_is_read_from_the_system(bench, tmp_path):
    """The first model name counts; without a file there is still a word."""
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Fast One @ 3 GHz\nmodel name\t: Other\n")
    assert bench["report"].processor(tmp_path / "cpuinfo") == "Fast One @ 3 GHz"
    assert bench["report"].processor(tmp_path / "none")


@pytest.fixture(scope="module")
def pair(bench, tmp_path_factory):
    """A tiny pair; the weights are drawn wide, so that the best token stands clear of the second."""
    make = bench["make_benchmark_pair"]
    place = tmp_path_factory.mktemp("pair")
    make.make_pair(
        make.PairOptions(
            place, hidden_size=64, layers=3, factor=0.3, spread=0.3, dtype="fp32", source=ROOT / "models/demo"
        )
    )
    return place


@pytest.mark.skipif(not (ROOT / "models/demo/target").exists(), reason="models/demo is not there")
def test_transformers_loops_agree_in_fp32(bench, measuring, pair):
    """All of transformers' loops but the compiled one give the same tokens, and their proposals are counted."""
    names = [name for name in bench["transformers_loops"].NAMES if name != "generate-compiled"]
    loops = bench["transformers_loops"].load_loops(
        pair, names, dtype="fp32", device="cpu", max_new_tokens=24, draft_length=4
    )
    options = bench["yardstick"].parse(["--models", str(pair), "--prompts", "2", "--dtype", "fp32"])
    prompts = bench["yardstick"].read_prompts(options)
    # The second prompt repeats itself: prompt lookup finds something in it.
    runs = measuring.measure(loops, [prompts[0][:20], prompts[1][:10] * 3], 2, _silent)
    assert measuring.differences(runs, exact=True) == []
    summaries = {loop.name: measuring.summarize(loop, runs[loop.name]) for loop in loops}
    assert all(len(run.token_ids) == 24 for passes in runs.values() for one in passes for run in one)
    assert summaries["generate"].tokens_per_round == summaries["generate-static"].tokens_per_round == 1.0
    assert 0.0 < summaries["generate-assisted"].acceptance < 1.0
    assert 1.0 < summaries["generate-assisted"].tokens_per_round <= 5.0
    for run in (run for one_pass in runs["generate-assisted"] for run in one_pass):
        assert run.rounds + run.accepted == len(run.token_ids)
    assert runs["generate-lookup"][0][1].proposed > 0
    assert runs["generate"][0][0].proposed == 0


@pytest.mark.skipif(not (ROOT / "models/demo/target").exists(), reason="models/demo is not there")
def test_benchmark_pair(bench, pair, tmp_path):
    """The draft is the target's beginning; a factor of 0 makes both say the same, and the draws do not depend on it."""
    make = bench["make_benchmark_pair"]
    options = make.parse([str(tmp_path), "--hidden-size", "64", "--layers", "3", "--factor", "0", "--spread", "0.3"])
    options = dataclasses.replace(options, dtype="fp32", source=ROOT / "models/demo")
    target, draft = make.make_pair(options)
    assert target > draft
    again, reference = (directory / "draft/model.safetensors" for directory in (tmp_path, pair))
    assert again.read_bytes() == reference.read_bytes()
    (loop,) = bench["transformers_loops"].load_loops(
        tmp_path, ["generate-assisted"], dtype="fp32", device="cpu", max_new_tokens=25, draft_length=4
    )
    run = loop.run(list(range(40, 60)))
    assert (run.rounds, run.accepted, run.proposed) == (5, 20, 20)


@pytest.mark.parametrize("layers", [0, 3])
def test_a_draft_has_fewer_layers(bench, tmp_path, layers):
    """A draft as deep as the target, or without layers, is refused before anything is written."""
    make = bench["make_benchmark_pair"]
    with pytest.raises(ValueError, match="draft_layers must be from 1 to 2"):
        make.make_pair(make.PairOptions(tmp_path, layers=3, draft_layers=layers))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not (ROOT / "models/demo/target").exists(), reason="models/demo is not there")
def test_acceptance_can_be_chosen(bench, tmp_path):
    """The factor found makes a pair whose acceptance, measured again by assisted generation, is near what was asked."""
    make = bench["make_benchmark_pair"]
    options = make.PairOptions(
        tmp_path, hidden_size=64, layers=3, acceptance=0.7, spread=0.3, dtype="fp32", source=ROOT / "models/demo"
    )
    make.make_pair(options)
    made = json.loads((tmp_path / "pair.json").read_text())
    assert made["acceptance_per_token"] == pytest.approx(0.7, abs=0.1)
    (loop,) = bench["transformers_loops"].load_loops(
        tmp_path, ["generate-assisted"], dtype="fp32", device="cpu", max_new_tokens=96, draft_length=5
    )
    prompts = bench["yardstick"].read_prompts(bench["yardstick"].parse(["--models", str(tmp_path), "--prompts", "8"]))
    shortest = min(map(len, prompts))
    runs = [loop.run(prompt[-shortest:]) for prompt in prompts]
    per_round = sum(len(run.token_ids) for run in runs) / sum(run.rounds for run in runs)
    rate = bench["measuring"].acceptance_per_token(per_round, 5)
    assert rate == pytest.approx(made["acceptance_per_token"], abs=0.05)


def test_rounds_follow_from_agreement(bench):
    """A round ends with its first disagreement or after k proposals, and always adds a token of the target's own."""
    rounds = bench["pair_acceptance"].tokens_per_round
    assert rounds([[True] * 13], 5) == 6.0
    assert rounds([[False] * 13], 5) == 1.0
    assert rounds([[True, False, True, True, True] + [True] * 5], 2) == pytest.approx((2 + 3 + 3) / 3)


def test_the_factor_is_found_by_halving(bench):
    """Of a rate that falls as the factor grows."""
    factor, rate = bench["pair_acceptance"].find_factor(lambda factor: 1 - factor, 0.9, steps=12)
    assert factor == pytest.approx(0.1, rel=0.01)
    assert rate == pytest.approx(0.9, abs=0.001)
