"""Loops of other programs against stand-ins that speak as they do."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from .loading import scripts

SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if "--help" in sys.argv:
    sys.exit(print("usage: {help}"))
if "broken" in str(sys.argv):
    sys.exit("cannot load the model")
class Handler(BaseHTTPRequestHandler):
    def reply(self, message):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(message).encode())
    def do_GET(self):
        self.reply({{"status": "ok", "path": self.path}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["ignore_eos"] and asked["temperature"] == 0 and not asked["cache_prompt"]
        drafted = dict(draft_n=10, draft_n_accepted=4) if "--model-draft" in sys.argv else dict()
        tokens = [asked["prompt"][-1] + 1 + i for i in range(asked["n_predict"] - ("short" in str(sys.argv)))]
        self.reply({{"tokens": tokens, "timings": {{"prompt_ms": 2.0, **drafted}}}})
    def log_message(self, *args):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
WORKER = """#!{python}
import json, pathlib, sys
if sys.argv[1].endswith("to_openvino.py"):
    pathlib.Path(sys.argv[3]).mkdir()
    sys.exit()
options = json.loads(sys.argv[2])
print("a line of the library's own")
print(json.dumps(dict(versions=options["precision"])), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    tokens = [asked["prompt"][-1] + 1 + i for i in range(asked["max_new_tokens"])]
    accepted = 3 if options["draft"] else 0
    print(json.dumps(dict(token_ids=tokens, seconds=0.5, accepted=accepted, rounds=len(tokens) - accepted)), flush=True)
"""


@pytest.fixture(scope="module")
def bench():
    with scripts(*(f"bench/{name}" for name in ("measuring", "conversions", "llama_loops", "openvino_loops"))) as found:
        yield found


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Checkpoints in name; conversions go below the working directory."""
    monkeypatch.chdir(tmp_path)
    for part in ("target", "draft"):
        (tmp_path / "pair" / part).mkdir(parents=True)
        (tmp_path / "pair" / part / "model.safetensors").touch()
    return tmp_path / "pair"


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def llama(bench, pair, names=("llama-alone", "llama-draft"), help="--spec-draft-n-max"):
    directory = pair.parent / "bin"
    directory.mkdir(exist_ok=True)
    script(directory / "llama-server", SERVER.format(python=sys.executable, help=help))
    source = pair.parent / "source"
    source.mkdir(exist_ok=True)
    # What the converter is run with here is a program that writes the file that it is told to write.
    converter = script(
        pair.parent / "convert",
        f"#!{sys.executable}\nimport pathlib, sys\npathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).touch()\n",
    )
    tools = bench["llama_loops"].LlamaTools(pair.parent, source, converter)
    settings = {"dtype": "bf16", "threads": 1, "max_new_tokens": 8, "draft_length": 5, "progress": lambda _: None}
    return tools, bench["llama_loops"].serve_loops(tools, pair, names, **settings)


def test_llama_continues_prompts(bench, pair):
    """Ids in, ids out; rounds are the tokens that were not accepted proposals."""
    _, serving = llama(bench, pair)
    with serving as (alone, draft):
        one, other = alone.run([1, 2, 3]), draft.run([1, 2, 3])
    assert one.token_ids == other.token_ids == tuple(range(4, 12))
    assert (one.rounds, one.proposed, one.accepted) == (8, 0, 0)
    assert (other.rounds, other.proposed, other.accepted) == (4, 10, 4)
    assert one.parts == {"prompt": 0.002}


@pytest.mark.parametrize(
    ("help", "flag"), [("--spec-draft-n-max N", "--spec-draft-n-max"), ("--draft-max N", "--draft-max")]
)
def test_the_flags_of_older_servers_are_known(bench, pair, help, flag):
    """Whatever the server calls it, the draft proposes as many as it is told."""
    tools, _ = llama(bench, pair, help=help)
    flags = bench["llama_loops"]._draft_flags(tools.server(), Path("d.gguf"), 5)
    assert flags[flags.index(flag) + 1] == "5"


def test_a_peer_that_is_not_there_says_so(bench, pair, monkeypatch):
    """Without a server, without a converter, with a server that ends, and with one that says too little."""
    error, tools = bench["conversions"].PeerError, bench["llama_loops"].LlamaTools
    monkeypatch.setenv("PATH", "")
    with pytest.raises(error, match="--llama-dir"):
        tools().server()
    with pytest.raises(error, match="no llama-server in"):
        tools(pair.parent).server()
    with pytest.raises(error, match="--llama-source"):
        tools().converted(pair / "target", "bf16")
    for word, message in (("broken", "cannot load the model"), ("short", "with 7 tokens")):
        renamed = pair.rename(pair.with_name(word))
        _, serving = llama(bench, renamed, ["llama-alone"])
        with pytest.raises(error, match=message), serving as (alone,):
            alone.run([1])
        pair = renamed


def test_conversions_are_kept(bench, pair):
    """Made once, and again when the weights are newer; a conversion that fails leaves nothing behind."""
    convert, error, made = bench["conversions"].convert, bench["conversions"].PeerError, []

    def make(place):
        made.append(place)
        place.write_text("converted")

    first = convert(pair / "target", "x", make)
    assert (convert(pair / "target", "x", make), len(made)) == (first, 1)
    assert first.read_text() == "converted"
    weights = pair / "target/model.safetensors"
    newer = first.stat().st_mtime + 10
    os.utime(weights, (newer, newer))
    convert(pair / "target", "x", make)
    assert len(made) == 2
    with pytest.raises(error, match="the conversion failed: too bad"):
        convert(pair / "draft", "x", lambda _: bench["conversions"].run([sys.executable, "-c", "exit('too bad')"]))
    assert [path.name for path in first.parent.iterdir()] == ["target-x"]


def test_openvino_continues_prompts(bench, pair):
    """The worker's own seconds count, and lines that are no answers are passed over."""
    worker = script(pair.parent / "worker", WORKER.format(python=sys.executable))
    names = bench["openvino_loops"].NAMES
    settings = {"dtype": "bf16", "threads": 1, "max_new_tokens": 8, "draft_length": 5, "progress": lambda _: None}
    with bench["openvino_loops"].serve_loops(worker, pair, names, **settings) as (alone, draft):
        one, other = alone.run([1, 2, 3]), draft.run([1, 2, 3])
        draft.worker.kill()
        with pytest.raises(bench["conversions"].PeerError, match="has ended"):
            draft.run([1])
    assert one.token_ids == other.token_ids == tuple(range(4, 12))
    assert (one.seconds, one.rounds, one.proposed) == (0.5, 8, 0)
    assert (other.rounds, other.proposed, other.accepted) == (5, 25, 3)


def test_openvino_is_optional(bench, pair):
    """Without an interpreter that has it there is a message."""
    settings = {"dtype": "bf16", "threads": 1, "max_new_tokens": 8, "draft_length": 5, "progress": json.dumps}
    serving = bench["openvino_loops"].serve_loops(None, pair, ["openvino-alone"], **settings)
    with pytest.raises(bench["conversions"].PeerError, match="--openvino-python"), serving:
        pass
