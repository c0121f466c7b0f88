"""Each example does what it says against real services, run by the command that stands in it."""

from __future__ import annotations

import ast
import asyncio
import json
import math
import re
import runpy
import socket
from pathlib import Path

import pytest

from specpair import OverloadedError, SamplingParams, SpeculativeClient, SyncSpeculativeClient

from ..client.fakes import FakeTarget
from ..e2e.test_security import DRAFT_TOKEN, TARGET_TOKEN, WRONG_TOKEN
from .running import BOUND, EXAMPLES, run, running

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
# What the examples ask for.
SAMPLED = {"temperature": 0.7, "seed": 1}


def alone(target, prompt, *, params=None, **given):
    """The target's own answer, without a draft."""
    with SyncSpeculativeClient(target.address, "none") as client:
        return client.generate(prompt, params or SamplingParams(**given))


def test_all_of_them_are_listed_and_run():
    """Every example stands in the README of the directory, and has a test here that runs it."""
    readme = (EXAMPLES / "README.md").read_text()
    tests = ast.parse(Path(__file__).read_text())
    run_here = {
        node.args[0].value
        for node in ast.walk(tests)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"run", "running"}
    }
    assert NAMES
    assert run_here == set(NAMES)
    assert set(re.findall(r"\]\((\w+)\.py\)", readme)) == set(NAMES)


def test_simple(target, draft):
    """The text is the target's own, and the draft was asked."""
    output, said = run("simple", target=target.address, draft=draft.address)
    assert output == alone(target, "def fibonacci(n):", max_new_tokens=64).text + "\n"
    tokens, rounds, taken, proposed = map(int, re.findall(r"\d+", said))
    assert (tokens, rounds + taken) == (64, 64)
    assert 0 < taken <= proposed


def test_streaming(target, draft):
    """It ends behind the line that was asked for, and nothing holds a slot then."""
    whole = alone(target, "class Stack:", max_new_tokens=200, **SAMPLED)
    output, said = run("streaming", lines=3, target=target.address, draft=draft.address)
    assert whole.text.startswith(output.removesuffix("\n"))
    assert 3 <= output.count("\n") < 12
    counts = [int(count) for count in re.findall(r": (\d+) tokens", said)]
    assert 0 < sum(counts) < 200
    for service in (target, draft):
        service.wait_until_free()


def test_chat_with_a_template(target, draft):
    """Turns are messages of one conversation: the same as the client's session, and its later turns are cached."""
    lines = ["Open a file.", "Read its lines."]
    output, said = run("chat", stdin="\n".join(lines) + "\n", target=target.address, draft=draft.address)
    params = SamplingParams(max_new_tokens=48, **SAMPLED)
    with SyncSpeculativeClient(target.address, draft.address) as client, client.session() as session:
        results = [session.generate([{"role": "user", "content": line}], params) for line in lines]
    assert output == "".join(f"{result.text}\n" for result in results)
    cached = [int(count) for count in re.findall(r"(\d+) of \d+ tokens were in the cache", said)]
    assert cached == [result.stats.cached_tokens for result in results]
    assert cached[1] > 0


def test_retries_when_full(replica, draft):
    """A full service says when to come back, and the example does: it ends with the tokens when a slot is free."""
    expected = alone(replica, "import os", max_new_tokens=32)
    replica.wait_until_free()
    with SyncSpeculativeClient(replica.address, "ngram") as client, client.session() as session:
        session.generate("import sys", SamplingParams(max_new_tokens=4))  # the slot is the session's until it ends
        with running("retries", within=60, target=replica.address, draft=draft.address) as process:
            refused = process.stderr.readline().decode()
            assert re.fullmatch(r"full \(KV_SLOTS_EXHAUSTED\): again in \d+\.\d s\n", refused)
            session.close()
            assert process.stdout.read().decode() == expected.text + "\n"
            assert process.wait(BOUND) == 0


def test_retries_that_give_up(replica, target, draft):
    """What is no use to try again ends at once, each with a status of its own."""
    addresses = {"target": replica.address, "draft": draft.address}
    replica.wait_until_free()
    with SyncSpeculativeClient(replica.address, "ngram") as client, client.session() as session:
        session.generate("import sys", SamplingParams(max_new_tokens=4))
        # Its last try may be refused, or still be on its way when the time is over.
        _, said = run("retries", within=5, expect=(3, 4), **addresses)
        # And its first one, where coming back takes longer than there is time.
        tries = r"(full \(KV_SLOTS_EXHAUSTED\): again in \d+\.\d s\n)*"
        assert re.match(tries + "(still full: KV_SLOTS_EXHAUSTED|out of time: )", said)
    with socket.socket() as reserved:  # bound, but not listening
        reserved.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{reserved.getsockname()[1]}"
        _, said = run("retries", within=1, expect=(3,), target=nobody, draft="ngram")
        assert said.startswith("unavailable: ")
    _, said = run("retries", "--max-new-tokens=0", expect=(2,), target=target.address, draft="ngram")
    assert said.startswith("wrong request: start.sampling.max_new_tokens: ")
    _, said = run("retries", "--max-new-tokens=400", within=0.4, expect=(4,), target=target.address, draft="none")
    assert said.startswith("out of time: ")


@pytest.mark.parametrize("end", ["kill", "ask_to_stop"])
def test_replicas(target, replica, draft, end):
    """The target that serves goes away in the middle, by a crash or by an operator: the text is the undisturbed one."""
    expected = alone(target, "import os\n", max_new_tokens=400, ignore_eos=True, **SAMPLED)
    for service in (target, replica):
        service.wait_until_free()
    addresses = {"target": f"{replica.address},{target.address}", "draft": draft.address}
    with running("replicas", **addresses) as process:
        beginning = process.stdout.read(1)
        [serving] = [service for service in (target, replica) if service.info().slots_in_use]
        getattr(serving, end)()
        output = (beginning + process.stdout.read()).decode()
        assert output == expected.text + "\n"
        assert "400 tokens, target lost 1 times" in process.stderr.read().decode()
        assert process.wait(BOUND) == 0
    serving.wait()


def test_secured(secured, tmp_path):
    """With its certificate and tokens it is let in by both services; with a wrong token it says why not."""
    for name, token in (("target", TARGET_TOKEN), ("draft", DRAFT_TOKEN), ("wrong", WRONG_TOKEN)):
        (tmp_path / name).write_text(token)
    given = {"ca": secured.ours.path, "cert": secured.client[0], "key": secured.client[1]}
    given |= {"draft_token_file": tmp_path / "draft", "target": secured.target, "draft": secured.draft}
    with SyncSpeculativeClient(secured.target, "none", **secured.options()) as client:
        expected = client.generate("import os", SamplingParams(max_new_tokens=32))
    assert run("secured", token_file=tmp_path / "target", **given) == (expected.text + "\n", "")
    output, said = run("secured", expect=(1,), token_file=tmp_path / "wrong", **given)
    assert (output, said) == ("", "not let in: a valid bearer token is required\n")


class Caller:
    """A connection to the example server."""

    def __init__(self, port):
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=BOUND)
        self._file = self._socket.makefile("rw")

    def ask(self, **request):
        """Sends one line."""
        self._file.write(json.dumps(request) + "\n")
        self._file.flush()

    def message(self):
        """The next line of the answer."""
        return json.loads(self._file.readline())

    def answer(self):
        """All text of one answer, and its last line."""
        text = ""
        while "text" in (message := self.message()):
            text += message["text"]
        return text, message

    def close(self):
        """Goes away."""
        self._file.close()
        self._socket.close()


def test_server(target, draft):
    """One client serves several callers at once with the target's own tokens; who goes away leaves no slot behind;
    wrong requests are answered; SIGTERM ends it."""
    asked = [{"max_new_tokens": 24}, {"max_new_tokens": 24, "temperature": 0.9, "seed": 7}]
    expected = [alone(target, "import os\n", **given) for given in asked]
    with running("server", listen="127.0.0.1:0", target=target.address, draft=draft.address) as process:
        port = int(process.stdout.readline().decode().rpartition(":")[2])
        callers = [Caller(port) for _ in asked]
        for caller, given in zip(callers, asked, strict=True):
            caller.ask(prompt="import os\n", **given)
        for caller, result in zip(callers, expected, strict=True):
            text, last = caller.answer()
            assert text == result.text
            assert last == {"finish_reason": result.finish_reason, "token_ids": list(result.token_ids)}
        first, second = callers
        first.ask(prompt="import os\n", temperature=-1)
        text, last = first.answer()
        assert (text, last["error"], last["field"]) == ("", "invalid", "start.sampling.temperature")
        first.ask(prompt="import os\n", no_such_field=1)
        assert first.answer()[1]["field"] == "no_such_field"
        second.ask(prompt="import os\n", max_new_tokens=450)
        assert second.message()["text"]
        second.close()
        for service in (target, draft):
            service.wait_until_free()
        process.terminate()
        assert process.wait(BOUND) == 0
        assert process.stderr.read() == b""
        first.close()


@pytest.mark.parametrize(("told", "passed_on"), [(2.5, 2.5), (None, None), (math.inf, None)])
def test_server_says_when_to_come_back(told, passed_on):
    """What a full target says is passed on as JSON, which has no infinity."""
    answer = runpy.run_path(str(EXAMPLES / "server.py"))["answer"]

    async def ask():
        target = FakeTarget(failure=OverloadedError("full", reason="KV_SLOTS_EXHAUSTED", retry_after=told))
        async with SpeculativeClient("target:1", "none", target_transport=target) as client:
            return [message async for message in answer(client, b'{"prompt": "x"}')]

    [message] = json.loads(json.dumps(asyncio.run(ask()), allow_nan=False))
    assert message == {"error": "overloaded", "reason": "KV_SLOTS_EXHAUSTED", "retry_after": passed_on}
