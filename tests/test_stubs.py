"""The committed stubs are what the protos generate, and the protos pass their linter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "client/specpair/v1"
BUF = ROOT / "node_modules/.bin/buf"


def test_stubs_are_what_the_protos_generate(tmp_path):
    """Generating again gives the committed files, byte for byte, none missing and none left over."""
    spec = importlib.util.spec_from_file_location("generate_stubs", ROOT / "tools/generate_stubs.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    (tmp_path / "specpair/v1").mkdir(parents=True)
    tool.generate(tmp_path)
    generated = _contents(tmp_path / "specpair/v1")
    committed = _contents(COMMITTED)
    committed.pop("py.typed", None)
    generated.pop("py.typed", None)
    assert sorted(generated) == sorted(committed)
    assert [name for name in generated if generated[name] != committed[name]] == [], "run `make protos`"


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.skipif(not BUF.exists(), reason="buf is not installed: `make check` installs it with npm")
def test_protos_pass_buf_lint():
    """The protos pass buf's STANDARD rules."""
    done = subprocess.run([BUF, "lint", ROOT / "protos"], check=False, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_npm_lock_names_no_machine():
    """The lock file pins packages by version and hash, and leaves the registry to npm's configuration."""
    lock = json.loads((ROOT / "package-lock.json").read_text())
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert packages["node_modules/@bufbuild/buf"]["version"] == "1.75.0"
    assert all(package["integrity"] and "resolved" not in package for package in packages.values())
