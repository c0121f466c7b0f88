"""Laws of `specpair bench`: theory, the relay, sweeps against fakes, the command."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import pytest

from specpair import InternalError, InvalidRequestError, SamplingParams, SpeculativeClient, Stats
from specpair.bench import running
from specpair.bench.comparison import Comparison, best, compare
from specpair.bench.costs import draft_token_seconds, resumed, step_times
from specpair.bench.measuring import Case, Figures, Generation, Run, differences, figures, measure, percentile
from specpair.bench.prompts import TEXTS, cut, random_prompts, read_texts
from specpair.bench.relay import relay
from specpair.bench.sweeps import Point, Sweep
from specpair.bench.theory import (
    Costs,
    acceptance_per_token,
    best_length,
    expected_tokens,
    pipelined_speedup,
    serial_speedup,
)

from .fakes import VOCABULARY, FakeDraft, FakeTarget, continuation
from .loopback import DraftServicer, TargetServicer, serving

PARAMS = SamplingParams(max_new_tokens=24)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.72, 1.0])
def test_acceptance_per_token_inverts_the_expected_tokens(rate):
    """The rate that Leviathan's formula turns into the tokens per round is found again."""
    assert acceptance_per_token(sum(rate**power for power in range(6)), 5) == pytest.approx(rate, abs=1e-9)


def test_expected_tokens_are_those_of_the_paper():
    """E(k) = (1 - a^(k+1)) / (1 - a); one without proposals, k + 1 of a perfect draft."""
    assert expected_tokens(0.8, 5) == pytest.approx((1 - 0.8**6) / (1 - 0.8))
    assert (expected_tokens(0.8, 0), expected_tokens(1.0, 7)) == (1.0, 8.0)


def test_speedups_between_their_limits():
    """A perfect draft costs the longer of drafting and verifying when they overlap, and their sum when they do not;
    a useless one gains nothing from overlap; the round trip is paid once a round."""
    costs = Costs(plain=0.02, draft=0.002, verify=0.022)
    assert serial_speedup(1.0, 5, costs) == pytest.approx(6 * 0.02 / 0.032)
    assert pipelined_speedup(1.0, 5, costs) == pytest.approx(6 * 0.02 / 0.022)
    assert pipelined_speedup(0.0, 5, costs) == pytest.approx(serial_speedup(0.0, 5, costs))
    slow = Costs(plain=0.02, draft=0.002, verify=0.022, round_trip=0.05)
    assert serial_speedup(1.0, 5, slow) == pytest.approx(6 * 0.02 / 0.082)


def test_the_best_length_follows_acceptance():
    """Nothing is worth proposing that is never accepted, everything that always is."""
    costs = Costs(plain=1.0, draft=0.1, verify=1.0)
    assert [best_length(rate, 7, costs) for rate in (0.0, 1.0)] == [0, 7]
    assert 0 < best_length(0.7, 7, costs) < 7


def test_percentiles_are_of_what_was_measured():
    """The least value that so many do not exceed."""
    assert [percentile(list(range(1, 101)), percent) for percent in (50, 99, 100)] == [50, 99, 100]
    assert (percentile([7.0], 99), percentile([], 50)) == (7.0, 0.0)


def generation(prompt=(1,), ids=(5, 6, 7), stamps=(0.5, 1.0), sizes=(1, 2), **stats):
    return Generation(prompt, ids, stamps, sizes, Stats(output_tokens=len(ids), **{"rounds": len(sizes), **stats}))


def test_figures_of_a_case():
    """Speed is of each prompt's median run; a chunk's tokens share its time; parts are by round."""
    case = Case("a", None, [(1,)], PARAMS, draft_length=2)
    told = {"proposed": 4, "accepted": 1, "verifying_seconds": 0.4}
    runs = [[Run(seconds, (generation(**told),))] for seconds in (1.0, 9.0, 2.0)]
    found = figures(case, runs)
    assert found.tokens_per_second == pytest.approx(3 / 2.0)
    assert (found.slowest, found.fastest) == (pytest.approx(3 / 9), 3.0)
    assert found.decode_ms_per_token == pytest.approx(250.0)
    assert (found.p50_ms_per_token, found.first_token_ms) == (pytest.approx(250.0), pytest.approx(500.0))
    assert (found.tokens_per_round, found.acceptance, found.draft_length) == (1.5, 0.25, 2.0)
    assert found.acceptance_per_token == pytest.approx((3**0.5 - 1) / 2)  # a with 1 + a + a² = 1.5
    assert found.ms_per_round["verifying"] == pytest.approx(200.0)


def test_the_target_alone_has_no_rounds_to_tell_of():
    """Without proposals there is no acceptance, and without verdicts no parts."""
    found = figures(Case("a", None, [(1,)], PARAMS), [[Run(1.0, (generation(),))]])
    assert (found.acceptance, found.acceptance_per_token, dict(found.ms_per_round)) == (None, None, {})


def test_differences_are_between_equal_questions():
    """Tokens must be the same for the same prompt and parameters, whoever proposes, and for nothing else."""
    other = SamplingParams(max_new_tokens=24, temperature=1.0)
    cases = [Case("a", None, [(1,)], PARAMS), Case("b", None, [(1,)], PARAMS), Case("c", None, [(1,)], other)]
    same, wrong = [[Run(1.0, (generation(),))]], [[Run(1.0, (generation(ids=(5, 6, 8)),))]]
    assert differences(cases, {"a": same, "b": same, "c": wrong}) == []
    assert differences(cases, {"a": same, "b": wrong, "c": same}) == ["b: not the tokens of a"]


def test_cases_take_turns_and_sessions_run_together():
    """Every prompt of every case as often as asked for, warmed up once; several sessions each have a prompt."""
    target = FakeTarget()
    told = []

    async def run():
        alone = SpeculativeClient("none", "none", target_transport=target)
        cases = [
            Case("one", alone, [(1, 2), (3, 4)], PARAMS),
            Case("three", alone, [(1, 2), (3, 4)], PARAMS, sessions=3),
        ]
        return cases, await measure(cases, 2, told.append)

    cases, runs = asyncio.run(run())
    assert {name: [len(one) for one in found] for name, found in runs.items()} == {"one": [2, 2], "three": [2, 2]}
    assert [one.prompt for one in runs["three"][0][0].generations] == [(1, 2), (3, 4), (1, 2)]
    assert runs["one"][0][0].generations[0].token_ids == tuple(continuation([1, 2], 24))
    assert runs["three"][1][1].tokens == 72
    assert differences(cases, runs) == []
    assert told[-1] == "run 2 of 2, prompt 2: one"


def test_steps_are_timed_by_the_targets_own_account():
    """As many steps as tokens but the first, with its forward time, and the tokens of plain decoding."""
    steps = asyncio.run(step_times(FakeTarget(), [1, 2], PARAMS))
    assert steps.token_ids == tuple(continuation([1, 2], 24))
    assert steps.forward == (pytest.approx(1e-4),) * 23
    assert all(0.0 <= between <= whole for between, whole in zip(steps.between, steps.rounds, strict=True))


def test_the_cost_of_a_draft_token_is_a_slope():
    """Asks alternate between one id and many, and each rejects the proposal before it."""
    draft = FakeDraft()
    assert asyncio.run(draft_token_seconds(draft, [1, 2], VOCABULARY, longest=5, asks=8)) >= 0.0
    assert [ask.max_tokens for ask in draft.asks] == [1, 5] * 4
    for before, ask in zip(draft.asks, draft.asks[1:], strict=False):
        assert ask.from_position == before.from_position + len(before.token_ids)
        assert len(ask.token_ids) == 1


def test_resumed_generations_go_on():
    """What was generated earlier, and what the target says behind it."""
    with serving(TargetServicer(), None) as address:

        async def run():
            async with SpeculativeClient(address, "none") as client:
                whole = (await client.generate([1, 2], PARAMS)).token_ids
                return whole, await resumed(client._target, [1, 2], PARAMS, ())

        whole, again = asyncio.run(run())
    assert again == whole == tuple(continuation([1, 2], 24))


def test_the_relay_changes_nothing_but_time():
    """All bytes arrive in order, both ways, and the answer takes a round trip at least."""

    async def run():
        received = bytearray()

        async def echo(reader, writer):
            while data := await reader.read(1000):
                received.extend(data)
                writer.write(data)
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with relay(f"127.0.0.1:{port}", 0.05) as address:
            host, _, own = address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(own))
            sent = bytes(range(256)) * 1000
            began = time.perf_counter()
            writer.write(sent)
            back = await reader.readexactly(len(sent))
            took = time.perf_counter() - began
        assert await reader.read() == b""  # the connection ended with the block
        writer.close()
        server.close()
        await server.wait_closed()
        assert bytes(received) == back == sent
        return took

    assert asyncio.run(run()) >= 0.05


def test_the_relay_to_nowhere_ends_the_connection():
    """As a service that is gone would."""

    async def run():
        async with relay("127.0.0.1:1", 0.0) as address:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
            data = await reader.read()
            writer.close()
            return data

    assert asyncio.run(run()) == b""


def test_prompts(tmp_path):
    """A file has texts or objects with one; cut prompts have their length; random ones do not repeat themselves."""
    file = tmp_path / "p.json"
    file.write_text(json.dumps(["one", {"name": "x", "text": "two"}, "three"]))
    assert read_texts(file, 2) == ["one", "two"]
    assert read_texts(None, 2) == list(TEXTS[:2])
    assert cut([(1, 2, 3), (4, 5)], 7) == [(1, 2, 3, 4, 5, 1, 2), (4, 5, 1, 2, 3, 4, 5)]
    first, second = random_prompts(1000, 2, 100)
    assert len(set(first)) == len(set(second)) == 100
    assert first != second
    assert random_prompts(1000, 2, 100) == [first, second]
    assert len(random_prompts(5, 1, 100)[0]) == 100


@pytest.mark.parametrize("content", ["nothing", "[]", '[{"name": "x"}]', "7"])
def test_prompts_that_are_none(tmp_path, content):
    """The option is named."""
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(InvalidRequestError) as refused:
        read_texts(tmp_path / "p.json", 3)
    assert refused.value.field == "prompts"


def point(value, speed, *, rate=None, verify=20.0, series="model"):
    parts = {"verifying": verify} if rate is not None else {}
    return Point(series, value, Figures(speed, speed, speed, 1e3 / speed, 1, 1, 1, 2.0, 0.5, rate, 1.0, parts), None)


def test_measured_speed_beside_theory():
    """The formulas get the measured acceptance and costs; without a fixed length there is no theory."""
    points = (point("alone", 50.0, series=""), point(0, 50.0), point(3, 100.0, rate=0.8), point("auto", 90.0))
    none, three, auto = compare(Sweep("draft-length", points), 0.002)
    costs = Costs(plain=0.02, draft=0.002, verify=0.02)
    assert three == Comparison(
        3,
        pytest.approx(2.0),
        0.8,
        pytest.approx(0.1),
        pytest.approx(1.0),
        pytest.approx(serial_speedup(0.8, 3, costs)),
        pytest.approx(pipelined_speedup(0.8, 3, costs)),
    )
    assert three.ratio == pytest.approx(2.0 / pipelined_speedup(0.8, 3, costs))
    assert (none.ratio, auto.ratio, auto.draft_length) == (None, None, "auto")
    assert best((none, three, auto)) is three
    assert best((none, auto)) is None


@pytest.mark.parametrize("text", ["", "a", "1,-2", "1;2"])
def test_lists_of_numbers_that_are_none(text):
    """The option is named."""
    with pytest.raises(InvalidRequestError) as refused:
        running.numbers(text, "delay")
    assert refused.value.field == "delay"


def test_differing_tokens_are_an_error(monkeypatch, capsys):
    """After everything has been printed."""

    async def measured(options, progress):
        return running.Outcome((Sweep("delay", (), ("b: not the tokens of a",)),), (), None, None, None)

    monkeypatch.setattr(running, "run_sweeps", measured)
    with pytest.raises(InternalError, match="not the tokens of a"):
        running.run(running.Options("a:1", "b:2"))
    assert "delay" in capsys.readouterr().out


@pytest.fixture(scope="module")
def address():
    with serving(TargetServicer(), DraftServicer()) as opened:
        yield opened


def command(address, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "specpair.cli", "bench", "--target", address, "--draft", address, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_measures_and_writes(address, tmp_path):
    """One JSON object, the same in a file, with every sweep, its cases and no differences."""
    done = command(
        address,
        *("--max-new-tokens", "12", "--repeats", "1", "--prompt-count", "2", "--json", "--output", str(tmp_path)),
        *("--sessions", "1,2", "--context", "8,4000", "--temperature", "0", "--delay", "0,2"),
        *("--sweeps", "draft-length,proposer,delay,context"),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert {**told, "date": ""} == {**written, "date": ""}
    assert list(told["sweeps"]) == ["draft-length", "proposer", "delay", "context"]
    lengths = told["sweeps"]["draft-length"]["points"]
    assert [one["value"] for one in lengths] == ["alone", *range(8), "auto"]
    assert {one["figures"]["tokens_per_second"] > 0 for one in lengths} == {True}
    assert {one["value"] for one in told["sweeps"]["delay"]["points"]} == {0.0, 2.0}
    assert told["sweeps"]["context"]["skipped"] == ["prompt of 4000: the target has room for 1011"]
    assert [one["draft_length"] for one in told["theory"]] == [*range(8), "auto"]
    assert told["differences"] == []
    assert told["target"]["verify_width"] == 8


def test_the_command_prints_tables(address):
    """A row for every case, and what theory says."""
    done = command(
        address, "--max-new-tokens", "8", "--repeats", "1", "--prompt-count", "1", "--sweeps", "draft-length"
    )
    assert done.returncode == 0, done.stderr
    assert "by draft length" in done.stdout
    assert "beside theory" in done.stdout
    assert "auto" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--sweeps", "moon"], "sweeps"),
        (["--sessions", "1,0"], "sessions"),
        (["--context", "1.5"], "context"),
        (["--delay", "x"], "delay"),
        (["--draft", "ngram"], "draft"),
    ],
)
def test_wrong_options_are_named(address, arguments, field):
    """Exit code 2, one line."""
    done = command(address, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {field}: ")
