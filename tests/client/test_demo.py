"""Laws of the demonstration, with services that start in no time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specpair import ModelLoadError, services

ROOT = Path(__file__).parents[2]
SERVE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.client.loopback import DraftServicer, TargetServicer, serving
listen = sys.argv[sys.argv.index("--listen") + 1]
print("ready soon")
"""
FAKES = {
    "specpair_target": SERVE + "with serving(TargetServicer(), None, listen): time.sleep(600)",
    "specpair_draft": SERVE + "with serving(None, DraftServicer(), listen): time.sleep(600)",
}
STUBBORN = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('no', flush=True)\ntime.sleep(600)"
)
BROKEN = "import sys\nsys.exit('error: model: no such directory')"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts modules in the place of the services', for child processes: `python -m` looks where it is started first."""
    monkeypatch.chdir(tmp_path)

    def put(**modules):
        for name, code in (FAKES | modules).items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").touch()
            (tmp_path / name / "__main__.py").write_text(code)

    return put


@pytest.fixture
def models(tmp_path):
    directory = tmp_path / "models"
    for part in ("target", "draft"):
        (directory / part).mkdir(parents=True)
    prompts = [{"name": f"p{i}", "module": "m", "text": text} for i, text in enumerate(("abc", "hello", "x" * 40))]
    (directory / "prompts.json").write_text(json.dumps(prompts))
    return directory


def demo(models, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "specpair.cli", "demo", "--models", str(models), "--max-new-tokens", "20", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def own_children():
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def gone(pid, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


def test_json_is_one_object(install, models):
    """Measured figures, and whether the tokens were the same."""
    install()
    process = demo(models, "--json", "--repeats", "2", "--prompts", "2")
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    figures = json.loads(output)
    assert figures["tokens_identical"] is True
    assert figures["speedup"] > 0
    # The draft is always right. Lookups beside it are not, and whether it is asked at all is a matter of time.
    assert 0.0 <= figures["acceptance_rate"] <= 1.0
    assert figures["target_alone_tokens_per_second"] > 0
    assert figures["pair_tokens_per_second"] > 0
    assert (figures["prompts"], figures["repeats"], figures["runs"], figures["max_new_tokens"]) == (2, 2, 4, 20)


def test_for_people_there_is_a_report(install, models):
    """Prompts, their continuations, and the comparison."""
    install()
    output, _ = demo(models, "--repeats", "1").communicate(timeout=180)
    assert "hello" in output
    assert "accepted" in output
    assert "tokens/s" in output
    assert "identical in 3 runs" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_both_services(install, models, number):
    """Ctrl-C and SIGTERM end the services too, with no traceback."""
    install()
    process = demo(models, "--repeats", "100000")
    try:
        end = time.monotonic() + 30
        while len(pids := children(process)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        _, errors = process.communicate(timeout=90)
    finally:
        process.terminate()
    assert process.returncode == 128 + number
    assert all(gone(pid) for pid in pids)
    assert "Traceback" not in errors


def test_a_service_that_does_not_start_says_why(install, models):
    """The service's own last words, exit code 2, and nothing keeps running."""
    install(specpair_draft=BROKEN)
    process = demo(models)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 2
    assert errors.startswith("error: the draft ended with code 1: error: model: no such directory")


def test_a_service_that_does_not_stop_is_killed(install, monkeypatch):
    """After the grace period nothing keeps running, whatever the service thinks of SIGTERM."""
    install(specpair_draft=STUBBORN)
    monkeypatch.setattr(services, "_GRACE", 0.3)
    others = own_children()
    with services.started([], []) as pair:
        asyncio.run(pair[0].wait(lambda *_: None))
        pids = own_children() - others
        end = time.monotonic() + 20
        while pair[1]._words() != "no" and time.monotonic() < end:
            time.sleep(0.05)
    assert len(pids) >= 2
    assert all(gone(pid) for pid in pids)


def test_both_services_end_with_the_block(install):
    """Also when the block raises."""
    install(specpair_target=BROKEN)
    with pytest.raises(ModelLoadError, match="no such directory"), services.started([], []) as (target, draft):
        asyncio.run(target.wait(lambda *_: None))
    assert draft._process.returncode is not None
