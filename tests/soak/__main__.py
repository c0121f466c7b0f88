"""`make soak`: an hour of clients on a pair that is killed all the time, then the e2e tests many times over.

Writes bench/results/soak.json and exits with 1 when a token differed, an error had no type, memory, threads or file
descriptors grew, or a test failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..e2e.processes import DEMO, Service
from .running import Outcome, Plan, soak

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "bench" / "results" / "soak.json"
_TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}:\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:\n{% endif %}"
)
# Tests that do something at random, and how often.
_RUNS = {
    "tests/e2e/test_draft_lost.py": 100,
    "tests/e2e/test_target_lost.py": 50,
    "tests/e2e/test_cancellation.py": 200,
    "tests/e2e/test_network.py": 20,
}


def main() -> None:
    """Does what the arguments say."""
    parser = argparse.ArgumentParser(prog="make soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600.0, help="of the first part; 0 leaves it out")
    parser.add_argument("--result", type=Path, default=_RESULTS, help="where the figures go")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between two kills")
    parser.add_argument("--clients", type=int, default=8, help="clients of the pair that is killed")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the tests' runs; 0 leaves the second part out"
    )
    arguments = parser.parse_args()
    failed = []
    if arguments.seconds:
        outcome = _soak(Plan(arguments.seconds, arguments.interval, arguments.clients))
        _write(outcome, arguments.result)
        _show(outcome)
        failed += outcome.faults()
    if arguments.scale:
        failed += _many_runs(arguments.scale)
    for fault in failed:
        print(f"fault: {fault}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _soak(plan: Plan) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="specpair-soak-") as directory:
        logs = Path(directory)
        model = logs / "model"
        shutil.copytree(DEMO / "target", model)
        (model / "chat_template.jinja").write_text(_TEMPLATE)
        models = (model, DEMO / "draft")
        flags = ("--slots=6", "--max-length=512")
        services: list[Service] = []
        try:
            for role, path in zip(("target", "draft"), models, strict=True):
                services.append(Service(role, logs / f"steady-{role}.log", f"--model={path}", *flags))
            return asyncio.run(soak(plan, *services, models, logs))
        finally:
            for service in services:
                service.stop()


def _write(outcome: Outcome, result: Path) -> None:
    result.write_text(json.dumps(outcome.summary(), indent=2) + "\n")
    print(f"written: {result}")


def _show(outcome: Outcome) -> None:
    for name, tally in (("disturbed", outcome.disturbed), ("left alone", outcome.steady)):
        print(f"{name}: {tally.summary()}")
    print(f"events: {dict(outcome.events)}")
    print(f"{'process':10} {'metric':10} {'median':>10} {'per hour':>10} {'growth':>10} {'allowed':>10}")
    for name, trends in outcome.trends.items():
        for trend in trends:
            verdict = ("flat" if trend.flat else "grows") if trend.judged else "too short to tell"
            numbers = (trend.median, trend.per_hour, trend.growth, trend.allowed)
            print(f"{name:10} {trend.metric:10} " + " ".join(f"{number:10.2f}" for number in numbers) + f"  {verdict}")


def _many_runs(scale: float) -> list[str]:
    failed = []
    for path, count in _RUNS.items():
        runs = max(1, round(count * scale))
        print(f"{path}: {runs} runs", flush=True)
        environment = {**os.environ, "SPECPAIR_TEST_RUNS": str(runs)}
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", path], cwd=_ROOT, env=environment, check=False)
        if done.returncode:
            failed.append(f"{path} with {runs} runs")
    return failed


if __name__ == "__main__":
    main()
