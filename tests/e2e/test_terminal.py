"""The `specpair` command where people are: in a terminal, and while services start."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import termios
import threading
import time

import pytest

from specpair import SamplingParams, SpeculativeClient

from ..proxy import bound
from .processes import DEMO, environment, run, script, wait_for

SPECPAIR = script("specpair")
TEXTS = ["def add(a, b):", "def subtract(a, b):"]
TOKENS = 24
TEMPLATE = """{%- for message in messages -%}
{{ '# ' + message.role + '\n' + message.content + '\n' }}
{%- endfor -%}"""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\].*?\x07")


class Terminal:
    """A command whose three streams are a terminal of this process."""

    def __init__(self, *arguments, **extra):
        self._ours, theirs = pty.openpty()
        self.settings_before = self.settings()
        variables = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "100", "LINES": "30"}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", SPECPAIR, *arguments],  # Ctrl-C is for those whose terminal it is
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(**variables, **extra),
        )
        os.close(theirs)
        self.written = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while True:
            try:
                part = os.read(self._ours, 65536)
            except OSError:  # nobody has the other end
                return
            self.written += part.decode(errors="replace")

    @property
    def text(self):
        """What was written, without what moves the cursor and colours."""
        return _ESCAPES.sub("", self.written)

    def settings(self):
        """Modes and control characters of the terminal."""
        return termios.tcgetattr(self._ours)

    def type(self, keys):
        """Keys as a terminal sends them: Enter is a carriage return."""
        os.write(self._ours, keys.encode())

    def until(self, pattern, times=1, within=120):
        """Waits until something has been written so often."""
        wait_for(lambda: len(re.findall(pattern, self.text)) >= times or self._ended(), within, f"{pattern!r} written")
        assert len(re.findall(pattern, self.text)) >= times, self.text

    def _ended(self):
        return self.process.poll() is not None and not select.select([self._ours], [], [], 0)[0]

    def wait(self, within=60):
        """Exit code."""
        code = self.process.wait(within)
        self._reader.join(10)
        return code

    def close(self):
        """Ends the command if it has not ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal():
    """Starts commands in terminals, which end with the test."""
    opened = []

    def start(*arguments, **extra):
        opened.append(Terminal(*arguments, **extra))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def flags(pair, kind="model"):
    target, draft = pair(kind)
    return [f"--target={target}", f"--draft={draft}"]


def turns(pair, prompts, params):
    """Texts of a session's turns, as the library has them."""

    async def talk():
        async with SpeculativeClient(*pair("model")) as client, client.session() as session:
            return [(await session.generate(prompt, params)).text for prompt in prompts]

    return run(talk())


class TestChat:
    """`specpair chat`."""

    def test_piped(self, fp32):
        """A line is a turn of one session, printed as it is; as JSON with what was computed anew."""
        params = SamplingParams(max_new_tokens=TOKENS)
        first = turns(fp32, [TEXTS[0] + "\n"], params)[0]
        second = ("" if first.endswith("\n") else "\n") + TEXTS[1] + "\n"
        expected = turns(fp32, [TEXTS[0] + "\n", second], params)
        arguments = ["chat", "--plain", *flags(fp32), f"--max-new-tokens={TOKENS}"]
        given = {"input": "\n".join(TEXTS).encode(), "capture_output": True, "timeout": 180, "env": environment()}
        done = subprocess.run([SPECPAIR, *arguments], **given)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode() == "".join(f"{text}\n" for text in expected)
        done = subprocess.run([SPECPAIR, *arguments, "--json"], **given)
        assert done.returncode == 0
        printed = [json.loads(line) for line in done.stdout.splitlines()]
        assert [one["text"] for one in printed] == expected
        assert printed[1]["stats"]["cached_tokens"] >= printed[0]["prompt_tokens"]

    def test_typed(self, fp32, terminal, tmp_path):
        """Answers in colour with their figures, Ctrl-C stops one of them, and everything is free at the end."""
        state = {"XDG_STATE_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
        chat = terminal("chat", "--plain", *flags(fp32), "--max-new-tokens=8", "--ignore-eos", **state)
        chat.until("Ctrl-D ends")
        chat.type(f"{TEXTS[0]}\r")
        chat.until(r"tokens/s\s+>")
        chat.type("/params max_new_tokens=200\r")
        chat.until("max_new_tokens=200 ignore_eos=True")
        before = chat.text.count("tokens/s")
        chat.type(f"{TEXTS[1]}\r")
        chat.until("tokens/s", before + 2)
        chat.type("\x03")
        chat.until("stopped; what was said stays")
        chat.type("/params max_new_tokens=4\r")
        chat.until("max_new_tokens=4 ignore_eos=True")
        before = len(re.findall(r"tokens/s\s+>", chat.text))
        chat.type("x = 1\x1b\ry = 2\r")
        chat.until(r"tokens/s\s+>", before + 1)
        chat.type(f"/save {tmp_path / 'said.txt'}\r")
        wait_for((tmp_path / "said.txt").exists, 30, "the conversation written")
        chat.type("\x04")
        assert chat.wait() == 0
        said = (tmp_path / "said.txt").read_text()
        assert said.startswith(f"{TEXTS[0]}\n")
        assert "x = 1\ny = 2\n" in said
        history = (tmp_path / "specpair" / "chat_history").read_text()
        assert f"+{TEXTS[0]}\n" in history
        assert "+x = 1\n+y = 2\n" in history

    def test_typed_ahead(self, fp32, terminal, tmp_path):
        """What is typed into an answer waits for the prompt: a line, and Ctrl-D. The terminal is left as it was."""
        arguments = ["chat", "--plain", "--no-history", *flags(fp32), "--max-new-tokens=60", "--ignore-eos"]
        chat = terminal(*arguments, XDG_CONFIG_HOME=str(tmp_path))
        chat.until("Ctrl-D ends")
        chat.type(f"{TEXTS[0]}\r")
        chat.until("tokens/s")
        chat.type(f"{TEXTS[1]}\r\x04")
        assert chat.wait() == 0
        assert len(re.findall(r"\d tokens/s\s+>", chat.text)) == 2
        assert chat.settings() == chat.settings_before

    def test_terminated(self, fp32, terminal, tmp_path):
        """SIGTERM ends it at once, and leaves the terminal as it was."""
        chat = terminal("chat", "--plain", "--no-history", *flags(fp32), XDG_CONFIG_HOME=str(tmp_path))
        chat.until(r"Ctrl-D ends\.\s+>")
        assert chat.settings() != chat.settings_before
        chat.process.send_signal(signal.SIGTERM)
        assert chat.wait() == -signal.SIGTERM
        assert chat.settings() == chat.settings_before

    def test_conversation(self, launch, tmp_path_factory):
        """With a chat template lines are messages; without one the command says what to do."""
        model = tmp_path_factory.mktemp("templated") / "target"
        shutil.copytree(DEMO / "target", model)
        (model / "chat_template.jinja").write_text(TEMPLATE)
        target = launch("target", f"--model={model}", "--dtype=fp32", "--slots=1", "--max-length=320")
        arguments = ["chat", f"--target={target.address}", "--draft=ngram", "--system=Be brief.", "--max-new-tokens=6"]
        given = {"input": b"One.\nTwo.\n", "capture_output": True, "timeout": 180, "env": environment()}
        done = subprocess.run([SPECPAIR, *arguments, "--json"], **given)
        assert (done.returncode, done.stderr) == (0, b"")
        printed = [json.loads(line) for line in done.stdout.splitlines()]

        async def rendered(messages):
            async with SpeculativeClient(target.address, "none") as client:
                return len(await client.tokenize(messages))

        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One."}]
        assert printed[0]["prompt_tokens"] == run(rendered(messages))
        messages += [{"role": "assistant", "content": printed[0]["text"]}, {"role": "user", "content": "Two."}]
        assert printed[1]["prompt_tokens"] == run(rendered(messages))
        target.wait_until_free()

    def test_without_a_template(self, fp32):
        """One line that names the option, exit code 2."""
        done = subprocess.run(
            [SPECPAIR, "chat", *flags(fp32)], input=b"x\n", capture_output=True, timeout=180, env=environment()
        )
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(b"error: plain: the model has no chat template")

    def test_interrupted_where_nobody_types(self, fp32):
        """Ctrl-C ends it with 130, though more lines may come, and frees the slots."""
        process = subprocess.Popen(
            [SPECPAIR, "chat", "--plain", *flags(fp32), "--max-new-tokens=2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        process.stdin.write(b"x = 1\n")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert b"Traceback" not in process.stderr.read()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


class TestTerminal:
    """Other commands in a terminal."""

    def test_generate(self, fp32, terminal):
        """Coloured, and the same text; with NO_COLOR nothing besides."""
        arguments = ["generate", TEXTS[0], *flags(fp32), "--max-new-tokens=24"]
        expected = turns(fp32, TEXTS[:1], SamplingParams(max_new_tokens=TOKENS))[0]
        coloured, plain = terminal(*arguments), terminal(*arguments, NO_COLOR="1")
        assert (coloured.wait(), plain.wait()) == (0, 0)
        assert plain.written.replace("\r\n", "\n") == expected + "\n"
        assert "\x1b[3" in coloured.written
        assert coloured.text.replace("\r\n", "\n").startswith(expected)

    def test_interrupted(self, fp32, terminal):
        """Ctrl-C in an answer ends the command with 130."""
        generate = terminal("generate", TEXTS[0], *flags(fp32), "--ignore-eos", "--max-new-tokens=290")
        wait_for(lambda: generate.written, 60, "something written")
        generate.type("\x03")
        assert generate.wait() == 130
        assert "Traceback" not in generate.text


class TestStarting:
    """Commands that wait for a service that has just been started."""

    @pytest.fixture
    def place(self):
        """Keeps a port from others until a service listens there."""
        with bound(0) as place:
            yield place

    def test_phases(self, place, launch, terminal):
        """Bars in a terminal and lines elsewhere, from ModelInfo, until it serves; then commands go on."""
        address = f"127.0.0.1:{place.getsockname()[1]}"
        options = [f"--model={DEMO / 'target'}", "--slots=1", "--max-length=256", "--threads=1"]
        waiting = subprocess.Popen(
            [SPECPAIR, "health", f"--target={address}", "--wait=180", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        shown = terminal("info", f"--target={address}", "--draft=none", "--wait=180")
        time.sleep(1)
        service = launch("target", f"--listen={address}", *options, listen=False)
        # It may be ready before gRPC tries the address again, after a second: so it stands still for that long.
        wait_for(lambda: any(one["event"] == "listening" for one in service.entries()), 120, "the target listens")
        service.send(signal.SIGSTOP)
        time.sleep(1.5)
        service.send(signal.SIGCONT)
        output, error = waiting.communicate(timeout=200)
        assert waiting.returncode == 0, error
        assert json.loads(output) == {"target": {"address": address, "serving": True}}
        lines = error.decode().splitlines()
        assert lines[0].startswith(f"target {address}: not reachable")
        assert any(re.match(rf"target {address}: (loading|warming up)", line) for line in lines)
        assert lines[-1] == f"target {address}: ready"
        assert shown.wait(180) == 0
        assert re.search(r"(loading|warming up) .*%", shown.text)
        assert "LlamaForCausalLM" in shown.text
        assert service.address == address
