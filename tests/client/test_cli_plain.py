"""Laws of what is written where: colours and lines that are redrawn on a terminal, plain text elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess

import pytest

from specpair import OverloadedError
from specpair.v1 import common_pb2, target_pb2

from .commanding import COMMAND, command, environment
from .fakes import continuation, text_of
from .loopback import DraftServicer, TargetServicer, fail, serving
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


@pytest.mark.parametrize("columns", ["40", "120"])
def test_a_verdict_is_a_line_where_there_is_no_terminal(address, columns):
    """However narrow the surroundings say that a terminal is: a heading, a rule and a line per position."""
    done = command(*commands(address)["explain"], COLUMNS=columns)
    assert (done.returncode, done.stderr) == (0, "")
    heading, rule, *verdicts = [line for line in done.stdout.splitlines() if line.strip()]
    assert heading.split()[0] == "at"
    assert not rule.strip("─ ")
    assert [line.split()[0] for line in verdicts] == [str(len(PROMPT) + row) for row in range(3)]


def test_exit_codes_are_the_same_on_a_terminal(address):
    """2 for what is wrong, 3 for what cannot be reached, and no traceback."""
    assert on_a_terminal("generate", "x", f"--target={address}", "--draft=none", "--top-k=-1")[0] == 2
    code, written = on_a_terminal("generate", "x", "--target=127.0.0.1:1", "--draft=none", "--resume-timeout=0")
    assert code == 3
    assert "Traceback" not in written


# Sets a terminal's title, and clears it by a character that is no escape.
HOSTILE = "\x1b]0;owned\x07\x9b2J"


class HostileServicer(TargetServicer):
    """Every text of its answers would control a terminal."""

    def GetModelInfo(self, request, context):
        answer = super().GetModelInfo(request, context)
        answer.info.model = answer.info.detail = HOSTILE
        return answer

    def Generate(self, request, context):
        if request.prompt.text == "full":
            fail(context, OverloadedError(HOSTILE))
        yield target_pb2.GenerateResponse(started=self.started([1, 2]))
        end = common_pb2.FINISH_REASON_STOP_TOKEN
        committed = common_pb2.CommittedTokens(
            token_ids=[7], text_delta=HOSTILE, text_lengths=[len(HOSTILE)], finish_reason=end
        )
        yield target_pb2.GenerateResponse(committed=committed)

    def ExplainVerify(self, request, context):
        answer = super().ExplainVerify(request, context)
        for position in answer.positions:
            position.reason = HOSTILE
        return answer

    def Detokenize(self, request, context):
        return target_pb2.DetokenizeResponse(text=HOSTILE)


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_service_controls_a_terminal(no_color):
    """Neither by an output nor by a name, a reason or an error, in colours and without."""
    with serving(HostileServicer()) as address:
        alone = [f"--target={address}", "--draft=none"]
        for arguments in (
            ["generate", PROMPT, *alone],
            ["generate", "full", *alone],
            ["info", *alone],
            ["explain", PROMPT, f"--target={address}", "--proposal-ids=1,2"],
        ):
            _, written = on_a_terminal(*arguments, NO_COLOR=no_color)
            assert "␛]0;owned" in written or "\\x1b]0;owned" in written, arguments
            assert not {"\x1b]", "\x07", "\x9b"} & {written[i : i + n] for i in range(len(written)) for n in (1, 2)}


def test_a_pipe_gets_every_character():
    """What a program reads is the output itself."""
    with serving(HostileServicer()) as address:
        done = command("generate", PROMPT, "--target", address, "--draft", "none")
    assert done.stdout == HOSTILE + "\n"


@pytest.mark.parametrize("prompt", ["x = 'é", "full"])
@pytest.mark.parametrize("name", ["generate", "explain", "info"])
def test_an_encoding_without_the_characters(name, prompt):
    """They are written as escapes, by every command and on both streams, and nothing fails for want of them."""
    with serving(HostileServicer()) as address:
        asked = {"generate": [prompt, "--draft=none"], "explain": [prompt, "--proposal=é"], "info": ["--draft=none"]}
        arguments = [name, f"--target={address}", *asked[name]]
        usual, done = (command(*arguments, PYTHONIOENCODING=encoding) for encoding in ("utf-8", "ascii"))
    assert done.returncode == usual.returncode
    assert done.stderr == usual.stderr.encode("ascii", "backslashreplace").decode()
    assert (usual.stdout + usual.stderr).isascii() is False
    if name == "generate":  # lines of tables have other characters in ASCII
        assert done.stdout == usual.stdout.encode("ascii", "backslashreplace").decode()
