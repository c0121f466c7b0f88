"""Laws of what is written where: colours and lines that are redrawn on a terminal, plain text elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess

import pytest

from .commanding import COMMAND, command, environment
from .fakes import continuation, text_of
from .loopback import DraftServicer, TargetServicer, serving
from .test_cli import PROMPT, PROMPT_IDS


@pytest.fixture(scope="module")
def address():
    with serving(TargetServicer(), DraftServicer()) as opened:
        yield opened


def on_a_terminal(*arguments, **extra):
    """Exit code and what a command writes whose three streams are a terminal."""
    ours, theirs = pty.openpty()
    variables = environment(TERM="xterm-256color", **extra)
    process = subprocess.Popen([*COMMAND, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=variables)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # how Linux says that nobody has the other end
        pass
    finally:
        os.close(ours)
    return process.wait(60), written.decode()


def commands(address):
    """Every command that shows something about services or a model without bringing its own."""
    both = [f"--target={address}", f"--draft={address}"]
    return {
        "generate": ["generate", PROMPT, *both, "--max-new-tokens=30"],
        "explain": ["explain", PROMPT, f"--target={address}", "--proposal-ids=1,2"],
        "info": ["info", *both],
        "health": ["health", *both],
        "help": ["--help"],
        "generate-help": ["generate", "--help"],
        "usage": ["generate", "--nonsense"],
        "error": ["generate", "x", f"--target={address}", "--draft=none", "--top-k=-1"],
    }


@pytest.mark.parametrize("name", commands(""))
def test_no_escapes_with_no_color(address, name):
    """A terminal is sent nothing to interpret, by no command."""
    _, written = on_a_terminal(*commands(address)[name], NO_COLOR="1")
    assert "\x1b" not in written
    assert written.strip()


@pytest.mark.parametrize("name", commands(""))
def test_no_escapes_where_there_is_no_terminal(address, name):
    """Piped, neither stream has any; nor has a terminal type any say in it."""
    done = command(*commands(address)[name], NO_COLOR="", TERM="xterm-256color")
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout + done.stderr


def test_a_terminal_gets_colours_and_the_same_text(address):
    """Proposals of the draft are green; without the escapes the text is that of a pipe."""
    code, written = on_a_terminal(*commands(address)["generate"], NO_COLOR="")
    assert code == 0
    assert "\x1b[32m" in written
    assert "proposals accepted" in written
    code, plain = on_a_terminal(*commands(address)["generate"], NO_COLOR="1")
    assert (code, plain) == (0, "".join(map(text_of, continuation(PROMPT_IDS, 30))) + "\r\n")


def test_exit_codes_are_the_same_on_a_terminal(address):
    """2 for what is wrong, 3 for what cannot be reached, and no traceback."""
    assert on_a_terminal("generate", "x", f"--target={address}", "--draft=none", "--top-k=-1")[0] == 2
    code, written = on_a_terminal("generate", "x", "--target=127.0.0.1:1", "--draft=none", "--resume-timeout=0")
    assert code == 3
    assert "Traceback" not in written
