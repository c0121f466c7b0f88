"""Who types what the documentation says gets what it says: each command and each piece of Python, in order."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from typer.main import get_command

from specpair.commands import app
from specpair_draft.config import DraftConfig
from specpair_target.config import TargetConfig

from . import answers, grpcurl, not_run
from .documents import ROOT, all_commands, blocks, commands, documents
from .place import BOUND

COMMANDS = all_commands()
# Programs that not every machine has, and the documents whose commands need them.
THERE = {
    "buf": grpcurl.buf(),
    "curl": shutil.which("curl"),
    "openssl": shutil.which("openssl"),
    "node": shutil.which("node") and (ROOT / "examples/node/node_modules/@grpc/grpc-js").exists(),
}
NEEDS = {
    "README.md": {"buf"},
    "docs/gateway.md": {"curl"},
    "docs/observability.md": {"curl"},
    "docs/security.md": {"buf", "openssl"},
    "examples/node/README.md": {"node"},
}


def excused(excuses, place, text):
    """Whether a command or block is not run."""
    return any(excuse.covers(place, text) for excuse in excuses)


@pytest.mark.parametrize("document", documents())
def test_document(place, document):
    """All commands of a document succeed, and print what is shown of their output; all its Python runs."""
    if missing := {program for program in NEEDS.get(document, ()) if not THERE[program]}:
        pytest.skip(f"not installed, as .ci/run does: {', '.join(sorted(missing))}")
    shell = place.shell()
    for block in blocks(document):
        if block.language == "python":
            if not excused(not_run.PYTHON, block.place, block.text):
                done = place.python(block.text)
                assert done.returncode == 0, f"{block.place}:\n{block.text}\n{done.stdout}{done.stderr}"
            continue
        for command in commands(block):
            if excused(not_run.COMMANDS, command.place, command.text):
                continue
            if place.starts(command.text):
                place.start(command.text)
                continue
            done = shell.run(place.filled(command.text), BOUND)
            assert done.returncode == 0, f"{command.place}:\n{command.text}\n{done.stdout}{done.stderr}"
            if command.shown:
                assert done.stdout == place.filled(command.shown), command.place
            if command.words[0] in answers.NAMES:
                answers.ANSWERS[command.words[-1]](done.stdout)


def test_every_kind_of_call_is_documented():
    """There are calls with grpcurl of each kind, with and without TLS and a token."""
    kinds = {"list", *(f"specpair.v1.TargetService/{call}" for call in ("GetModelInfo", "Generate", "Verify"))}
    for name, document in (("grpcurl", "README.md"), ("as_alice", "docs/security.md")):
        calls = {one.words[-1] for one in COMMANDS if one.place.startswith(document) and one.words[0] == name}
        assert calls >= kinds


@pytest.mark.parametrize("excuse", [*not_run.COMMANDS, *not_run.PYTHON], ids=lambda excuse: excuse.pattern)
def test_excuses_are_needed(excuse):
    """Whatever is said not to be run still stands in the documentation."""
    python = [(block.place, block.text) for name in documents() for block in blocks(name) if block.language == "python"]
    everything = [(command.place, command.text) for command in COMMANDS] + python
    assert any(excuse.covers(*one) for one in everything)
    assert excuse.reason


NOT_RUN = [command for command in COMMANDS if excused(not_run.COMMANDS, command.place, command.text)]


@pytest.mark.parametrize("command", NOT_RUN, ids=lambda command: command.place)
def test_what_is_not_run_is_there(command):
    """Of a command that is not run: its `make` target exists, so do its files, and its program has its options."""
    words = command.words
    if words[0] == "make":
        done = subprocess.run(["make", "-n", words[1]], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
    for word in words[1:]:
        if (ROOT / word.partition("/")[0]).is_dir() and "/" in word and not word.startswith(("runs/", "secrets/", "-")):
            assert (ROOT / word).exists(), f"{command.place}: there is no {word}"
    known = _options(words)
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert known is None or options <= known, command.place


def _options(words):
    """The options of one of the project's own programs, as far as they can be had without running it; else None."""
    program = words[0].removeprefix(".venv/bin/")
    if program == "python":
        sources = [path.read_text() for path in (ROOT / words[1]).parent.glob("*.py")]
        return {option for source in sources for option in re.findall(r'"(--[a-z][a-z-]*)"', source)}
    if program in {"specpair-target", "specpair-draft"}:
        config = TargetConfig if program == "specpair-target" else DraftConfig
        return {f"--{name.replace('_', '-')}" for name in config.model_fields}
    if program == "specpair":
        command = get_command(app).commands[words[1]]
        return {option for parameter in command.params for option in parameter.opts}
    return None
