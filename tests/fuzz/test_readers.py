"""The fuzzing that coverage guides, for as long as a test may take; `make fuzz` goes on for longer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed: make fuzz")
def test_whatever_is_changed_in_a_request(tmp_path):
    """It is read, or refused with an error that names one of its fields."""
    command = [sys.executable, "-m", "tests.fuzz.readers", "-runs=2000", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Done 2000 runs" in done.stderr
