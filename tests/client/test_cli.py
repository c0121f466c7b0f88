"""Laws of the `specpair` command."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import specpair
from specpair import errors
from specpair.cli import exit_code

from .fakes import VOCABULARY, continuation, text_of
from .loopback import DraftServicer, TargetServicer, serving

PROMPT = "def f(x):\n\treturn"
PROMPT_IDS = [ord(c) % VOCABULARY for c in PROMPT]
EXPECTED = continuation(PROMPT_IDS, 30)


@pytest.fixture(scope="module")
def address():
    with serving(TargetServicer(), DraftServicer()) as opened:
        yield opened


def command(*arguments, stdin=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "specpair.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **environment},
        check=False,
    )


def generate(address, *arguments, **others):
    arguments = ["--target", address, "--draft", address, "--max-new-tokens", "30", *arguments]
    return command("generate", *arguments, **others)


def test_the_text_goes_to_stdout_and_nothing_else(address):
    """Piped, the output is the text and a newline."""
    done = generate(address, PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(map(text_of, EXPECTED)) + "\n"


def test_a_prompt_comes_from_a_file_or_from_stdin(address, tmp_path):
    """Byte for byte: no newline is added or removed."""
    file = tmp_path / "prompt.txt"
    file.write_bytes(PROMPT.encode())
    outputs = {
        generate(address, *arguments, stdin=stdin).stdout
        for arguments, stdin in [
            ([PROMPT], None),
            (["--prompt-file", str(file)], None),
            (["--prompt-file", "-"], PROMPT),
        ]
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("draft", ["model", "ngram", "none"])
def test_json_is_one_object(address, draft):
    """Text, ids and statistics as numbers."""
    done = generate(address, "--json", "--draft", address if draft == "model" else draft, PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    output = json.loads(done.stdout)
    assert output["token_ids"] == EXPECTED
    assert output["text"] == "".join(map(text_of, EXPECTED))
    assert output["prompt_tokens"] == len(PROMPT)
    assert output["finish_reason"] == "max_new_tokens"
    stats = output["stats"]
    assert stats["output_tokens"] == 30
    assert stats["accepted"] <= stats["proposed"]
    assert stats["acceptance_rate"] == (stats["accepted"] / stats["proposed"] if stats["proposed"] else 0.0)
    assert stats["tokens_per_second"] > 0
    assert stats["proposer"] == draft


def test_ids_in_place_of_text(address):
    """With --ids the output is the token ids."""
    assert generate(address, "--ids", PROMPT).stdout.split() == [str(id_) for id_ in EXPECTED]


def test_colours_tell_who_proposed(address):
    """Where colours are wanted, accepted proposals are green, and a summary is on stderr."""
    done = generate(address, PROMPT, FORCE_COLOR="1", NO_COLOR="")
    assert "\x1b[32m" in done.stdout
    assert "proposals accepted" in done.stderr


def test_info_and_health(address):
    """Both services are shown and asked."""
    done = command("info", "--target", address, "--draft", address)
    assert "target" in done.stdout
    assert "draft" in done.stdout
    info = json.loads(command("info", "--target", address, "--draft", address, "--json").stdout)
    assert (info["target"]["phase"], info["draft"]["fingerprint"]["vocabulary_size"]) == ("ready", VOCABULARY)
    assert command("health", "--target", address, "--draft", address).returncode == 0
    assert command("health", "--target", address, "--draft", "127.0.0.1:1").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        ([PROMPT, "--target", "127.0.0.1:1"], 3, "error: "),
        ([PROMPT, "--top-k", "-1"], 2, "error: start.sampling.top_k: "),
        (["full"], 3, "error: no slot"),
        ([""], 2, "error: start.prompt: must not be empty"),
        ([PROMPT, "--draft-length", "-1"], 2, "error: draft_length: "),
        ([], 2, "error: prompt: "),
        ([PROMPT, "--prompt-file", "-"], 2, "error: prompt: "),
        (["--prompt-file", "/does/not/exist"], 2, "error: prompt_file: "),
        ([PROMPT, "--max-new-tokens", "100000", "--timeout", "0.001"], 4, "error: not finished within 0.001 s"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(address, arguments, code, error):
    """`error: FIELD: what is wrong` on stderr, nothing on stdout, no traceback."""
    done = generate(address, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(error)
    assert done.stderr.count("\n") == 1


def test_every_error_has_an_exit_code():
    """0 is success only."""
    codes = {kind: exit_code(getattr(errors, kind)("x")) for kind in errors.__all__ if kind.endswith("Error")}
    assert codes["InvalidRequestError"] == codes["UnsupportedError"] == codes["DraftMismatchError"] == 2
    assert codes["UnavailableError"] == codes["OverloadedError"] == 3
    assert codes["DeadlineError"] == 4
    assert codes["InternalError"] == 1
    assert 0 not in codes.values()


def test_unknown_options_are_usage_errors():
    """Exit code 2, as for wrong values."""
    assert command("generate", "--nonsense").returncode == 2
    assert command("demo", "--models", "/does/not/exist").returncode == 2


def test_version():
    """The package's."""
    assert command("--version").stdout.strip() == specpair.__version__


def test_without_the_extra_it_says_what_is_missing():
    """One line and exit code 2 where typer is not installed."""
    code = "import sys; sys.modules['typer'] = None; from specpair.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the specpair command needs the extra cli: pip install 'specpair[cli]'\n"
