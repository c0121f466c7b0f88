"""The example in Node.js says what the Python client says."""

from __future__ import annotations

import json
import re
import shutil
import socket

import pytest

from specpair import SamplingParams, SyncSpeculativeClient
from specpair.v1 import target_pb2, target_pb2_grpc

from ..e2e.conftest import VOCABULARY
from ..e2e.drafts import hanging, liar, serving
from ..e2e.test_security import TARGET_TOKEN, WRONG_TOKEN
from .running import BOUND, EXAMPLES, finished

NODE = EXAMPLES / "node"
PROMPT = "import os\nimport sys\n\n\ndef main():\n    "
TOKENS = 48
# The largest seed there is: more than a number of JavaScript holds.
SAMPLINGS = {"greedy": {}, "seeded": {"temperature": 0.8, "seed": 2**64 - 1}}
_LOCK = json.loads((NODE / "package-lock.json").read_text())
_PACKAGE = json.loads((NODE / "package.json").read_text())

installed = pytest.mark.skipif(
    shutil.which("node") is None or not (NODE / "node_modules/@grpc/grpc-js").exists(),
    reason="the packages of examples/node are not installed: `make test` installs them where there is npm",
)


def node(*arguments, expect=(0,)):
    """What the command prints, on both streams."""
    words = ["node", NODE / "generate.mjs", PROMPT, f"--max-new-tokens={TOKENS}", *arguments]
    return finished(words, expect=expect)


@pytest.fixture(scope="module")
def expected(_target):
    """The Python client's answers, without a draft."""
    with SyncSpeculativeClient(_target.address, "none") as client:
        return {
            name: client.generate(PROMPT, SamplingParams(max_new_tokens=TOKENS, **given))
            for name, given in SAMPLINGS.items()
        }


def same(output, result):
    """The command's JSON object, which has the tokens, the text and the reason of a result."""
    printed = json.loads(output)
    assert printed["token_ids"] == list(result.token_ids)
    assert (printed["text"], printed["finish_reason"]) == (result.text, result.finish_reason)
    return printed


@installed
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ["model", "ngram", "none"])
def test_same_tokens(target, draft, expected, sampling, kind):
    """Greedy and sampled, with the draft service, with lookups of its own and with Generate; proposals are taken."""
    given = [f"--{name}={value}" for name, value in SAMPLINGS[sampling].items()]
    who = draft.address if kind == "model" else kind
    output, said = node("--json", f"--target={target.address}", f"--draft={who}", *given)
    printed = same(output, expected[sampling])
    assert said == ""
    assert printed["accepted"] == 0 if kind == "none" else printed["accepted"] >= (kind == "model")
    for service in (target, draft):
        service.wait_until_free()


@installed
def test_text_as_it_comes(target, expected):
    """Without --json it prints the text and nothing else, whatever the draft length."""
    for length in (0, 1, 7, 100):
        output, said = node(f"--target={target.address}", "--draft=ngram", f"--draft-length={length}")
        assert (output, said) == (expected["greedy"].text + "\n", "")


@installed
@pytest.mark.parametrize("behaviour", [liar(VOCABULARY), hanging], ids=["liar", "hanging"])
def test_a_draft_that_is_no_good(target, expected, behaviour):
    """A draft that lies, breaks or falls silent costs no token: prompt lookup goes on."""
    stub = target_pb2_grpc.TargetServiceStub(target.channel)
    info = stub.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest(), timeout=BOUND).info
    with serving(behaviour, fingerprint=info.fingerprint) as bad:
        output, said = node("--json", f"--target={target.address}", f"--draft={bad.address}")
        assert bad.sessions == 1
    same(output, expected["greedy"])
    assert said.startswith("going on with prompt lookup: ")
    target.wait_until_free()


@installed
def test_a_draft_that_is_not_used(target, expected):
    """Nor does a draft that nobody reaches, or one with another vocabulary."""
    with socket.socket() as reserved:  # bound, but not listening
        reserved.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{reserved.getsockname()[1]}"
        with serving(hanging) as foreign:
            for address, reason in ((nobody, "UNAVAILABLE"), (foreign.address, "another vocabulary")):
                output, said = node("--json", f"--target={target.address}", f"--draft={address}")
                same(output, expected["greedy"])
                assert said.startswith("prompt lookup alone: ")
                assert reason in said


@installed
def test_no_token_in_plain_text(tmp_path):
    """Where there is no TLS a token stays on this machine."""
    (tmp_path / "token").write_text(TARGET_TOKEN)
    arguments = ["--target=192.0.2.1:50051", "--draft=ngram", f"--token-file={tmp_path / 'token'}"]
    output, said = node(*arguments, expect=(1,))
    assert (output, said) == ("", "error: the token would go to 192.0.2.1:50051 in plain text: give a CA\n")


@installed
def test_secured(secured, tmp_path):
    """With a CA, a certificate and a token it is let in; the draft, which wants another token, is done without."""
    files = [f"--ca={secured.ours.path}", f"--cert={secured.client[0]}", f"--key={secured.client[1]}"]
    # A certificate's name, as Node.js wants no address there.
    ports = [("target", secured.target.rpartition(":")[2]), ("draft", secured.draft.rpartition(":")[2])]
    addresses = [f"--{role}=localhost:{port}" for role, port in ports]
    for name, token in (("right", TARGET_TOKEN), ("wrong", WRONG_TOKEN)):
        (tmp_path / name).write_text(token)
    with SyncSpeculativeClient(secured.target, "none", **secured.options()) as client:
        result = client.generate(PROMPT, SamplingParams(max_new_tokens=TOKENS))
    output, said = node("--json", *addresses, *files, f"--token-file={tmp_path / 'right'}")
    same(output, result)
    assert said.startswith("prompt lookup alone: 16 UNAUTHENTICATED")
    output, said = node("--json", *addresses, *files, f"--token-file={tmp_path / 'wrong'}", expect=(1,))
    assert (output, said) == ("", "error: 16 UNAUTHENTICATED: a valid bearer token is required\n")


def test_packages_are_pinned():
    """Exact versions in package.json, and a lock with the hash of every package and the address of none."""
    wanted = _PACKAGE["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
    locked = {name: package for name, package in _LOCK["packages"].items() if name}
    assert {name: locked[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert all(package["integrity"] and "resolved" not in package for package in locked.values())
