"""The habits of the repository: what runs by itself runs what everybody runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import specpair

ROOT = Path(__file__).resolve().parent.parent


def test_hosted_checks_are_the_local_ones():
    """The workflow runs `.ci/run` with read access alone, and every action in it is pinned by the hash of a commit."""
    [path] = (ROOT / ".github/workflows").glob("*.yml")
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)


def test_hooks_are_the_projects_own_tools():
    """Hooks fetch nothing: each runs a tool of .venv or node_modules, and `make check` runs the same one."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    for hook in config["repos"][0]["hooks"]:
        assert hook["entry"].startswith((".venv/bin/", "node_modules/.bin/"))
        assert hook["entry"].removesuffix(" --force-exclude") in makefile


def test_the_changelog_knows_the_version():
    """The first version in the changelog is the project's, which is the one that the client reports."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    [first, *_] = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first == declared == specpair.__version__
