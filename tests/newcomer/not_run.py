"""Commands of the documentation that are not typed in the newcomer's test, and why.

What is known of them without running them is checked nevertheless: their paths, their `make` targets, their options.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MINUTES = "measures for minutes; tests/bench and tests/client/test_bench.py run it short"
_CONTAINERS = "needs a container engine; tests/deploy reads the files"
_CLUSTER = "needs a cluster; tests/deploy reads the files"
_FETCHES = "fetches packages or sources"
_OWN_MODEL = "needs a model of the reader's own"


@dataclass(frozen=True)
class Excuse:
    """A regular expression for the beginning of commands, perhaps of one document alone, and why they are not run."""

    pattern: str
    reason: str
    document: str = ""

    def covers(self, place: str, text: str) -> bool:
        """Whether it is about this command, or this Python block."""
        return place.startswith(self.document) and re.match(self.pattern, text) is not None


COMMANDS = (
    Excuse(r"(make|(\.venv/bin/)?specpair) demo\b", "tests/e2e/test_command.py runs it short"),
    Excuse(r"make (test|venv|check|coverage|docs|dist|protos)\b", "is what .ci/run and other tests run"),
    Excuse(r"make (bench|soak|fuzz)\b", _MINUTES),
    Excuse(r"(\.venv/bin/)?specpair bench\b", _MINUTES),
    Excuse(r"\.venv/bin/python bench/\w+\.py", _MINUTES),
    Excuse(r"\.venv/bin/python tools/make_benchmark_pair\.py", _MINUTES),
    Excuse(r"([A-Z_]+=\S+ )?docker ", _CONTAINERS),
    Excuse(r"cp \.env\.example \.env", _CONTAINERS),
    Excuse(r"kubectl ", _CLUSTER),
    Excuse(r"serve (run|deploy) ", "needs Ray; tests/deploy/test_ray.py runs it where Ray is installed"),
    Excuse(r"torchrun ", "needs a model that takes several processes; tests/e2e/test_parallel.py runs a tiny one"),
    Excuse(r"pip install ", _FETCHES),
    Excuse(r"npm install ", _FETCHES),
    Excuse(r"cmake ", _FETCHES),
    Excuse(r"python3 -m venv ", _FETCHES),
    Excuse(r"openvino-venv/bin/pip ", _FETCHES),
    Excuse(r"\.venv/bin/specpair(-target|-draft| plan) (--model )?(SMALL_)?MODEL\b", _OWN_MODEL, "docs/quickstart.md"),
)

PYTHON = (Excuse(r"", "is what the demo models wrote", "models/demo/README.md"),)
