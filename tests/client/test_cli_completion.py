"""Laws of shell completion: the scripts, in their shells, complete commands, options and choices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .commanding import environment

SHELLS = {
    "bash": """
        eval "$(_SPECPAIR_COMPLETE=source_bash specpair)"
        complete -p specpair > /dev/null || exit 1
        COMP_WORDS=({words}) COMP_CWORD={last}
        _specpair_completion specpair
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """,
    "zsh": """
        compdef() {{ [[ $2 == specpair ]] || exit 1 }}
        _arguments() {{ print -r -- "$@" }}
        eval "$(_SPECPAIR_COMPLETE=source_zsh specpair)"
        words=({words}) CURRENT={count}
        _specpair_completion
    """,
    "fish": """
        _SPECPAIR_COMPLETE=source_fish specpair | source
        complete -C "{line}"
    """,
}
BIN = Path(sys.executable).parent


def run(shell, script, **extra):
    """A script in a shell that finds the command and reads no settings of its own."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    quiet = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    paths = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}
    command = [shell, *quiet, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment(**paths, **extra), check=False
    )


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("words", "offered", "others"),
    [
        (["specpair", "ge"], {"generate"}, {"chat", "health"}),
        (["specpair", "chat", "--no-"], {"--no-history", "--no-lookup", "--no-tls"}, {"--draft"}),
        (["specpair", "generate", "--rule", "co"], {"coupled"}, {"rejection"}),
    ],
)
def test_what_a_shell_offers(shell, words, offered, others):
    """What goes on from the last word, and nothing else."""
    script = SHELLS[shell].format(words=" ".join(words), line=" ".join(words), last=len(words) - 1, count=len(words))
    done = run(shell, script)
    assert done.stderr == ""
    found = done.stdout.replace('"', " ").replace(":", " ").split()
    assert offered <= set(found)
    assert not others & set(found)


@pytest.mark.parametrize("shell", ["bash"])
def test_it_can_be_installed(shell, tmp_path):
    """For the user alone, in the shell that asks for it; shown, it is the same script."""
    done = run(shell, "specpair --install-completion; exit $?", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "completion installed in" in done.stdout
    [script] = tmp_path.glob(".bash_completions/*")
    assert str(script) in (tmp_path / ".bashrc").read_text()
    shown = run(shell, "specpair --show-completion; exit $?", HOME=str(tmp_path))
    assert shown.stdout.strip() == script.read_text().strip()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_broken_file_of_settings_holds_nothing_up(shell, tmp_path):
    """A file that could not be used holds up no completion: it is for the command to say so."""
    (tmp_path / "specpair").mkdir()
    (tmp_path / "specpair" / "config.toml").write_text("nonsense = ")
    words = ["specpair", "generate", "--rule", "co"]
    script = SHELLS[shell].format(words=" ".join(words), line=" ".join(words), last=3, count=4)
    done = run(shell, script, XDG_CONFIG_HOME=str(tmp_path))
    assert "coupled" in done.stdout
