"""llama.cpp's server on the same weights and prompt ids: the target alone, and with the draft."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversions import PEERS, PeerError, convert, run
from measuring import Generation

__all__ = ["NAMES", "LlamaLoop", "LlamaTools", "serve_loops"]

NAMES = ("llama-alone", "llama-draft")
_FORMATS = {"bf16": "bf16", "fp32": "f32", "q8_0": "q8_0"}
# Seconds for a server to load its models, and for an answer.
_PATIENCE = 120.0


@dataclass(frozen=True)
class LlamaTools:
    """Where llama.cpp is."""

    directory: Path | None = None
    """Has llama-server, or bin/llama-server; None: it is on PATH."""
    source: Path | None = None
    """llama.cpp's source tree, for its converter."""
    python: Path = Path(sys.executable)
    """Has what the converter needs."""

    def server(self) -> Path:
        """The server. Raises PeerError if there is none."""
        if self.directory is None:
            if found := shutil.which("llama-server"):
                return Path(found)
            raise PeerError("no llama-server on PATH; --llama-dir names its directory")
        for place in (self.directory, self.directory / "bin"):
            if (place / "llama-server").exists():
                return place / "llama-server"
        raise PeerError(f"no llama-server in {self.directory.name}")

    def converted(self, checkpoint: Path, dtype: str) -> Path:
        """A checkpoint as GGUF. Raises PeerError if it has to be made and cannot be."""

        def make(place: Path) -> None:
            if self.source is None:
                raise PeerError("the checkpoint has to be converted first; --llama-source names llama.cpp's sources")
            script = (PEERS / "to_gguf.py").read_text(encoding="utf-8")
            options = ["--outfile", str(place), "--outtype", _FORMATS[dtype]]
            # With its directory as the current one, so that the converter finds its own modules.
            run([str(self.python), "-c", script, str(checkpoint.resolve()), *options], cwd=self.source)

        return convert(checkpoint, f"{dtype}.gguf", make)


@dataclass(frozen=True)
class LlamaLoop:
    """A client of a running llama-server: greedy, a fixed number of new tokens, the end of sequence ignored."""

    name: str
    port: int
    max_new_tokens: int
    draft_length: int | None

    def run(self, prompt: Sequence[int]) -> Generation:
        """Continues a prompt and times it. Raises PeerError if the server does not do as it is told."""
        asked = {
            "prompt": list(prompt),
            "n_predict": self.max_new_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "samplers": ["temperature"],
            "cache_prompt": False,
            "return_tokens": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        with contextlib.closing(connection):
            connection.connect()
            began = time.perf_counter()
            status, answer = _post(connection, "/completion", asked)
            seconds = time.perf_counter() - began
        if status != http.client.OK or len(answer["tokens"]) != self.max_new_tokens:
            raise PeerError(f"llama-server answered {status} with {len(answer.get('tokens', ()))} tokens")
        timings = answer["timings"]
        accepted = int(timings.get("draft_n_accepted", 0))
        tokens = tuple(answer["tokens"])
        parts = {"prompt": timings["prompt_ms"] / 1e3}
        return Generation(tokens, seconds, len(tokens) - accepted, int(timings.get("draft_n", 0)), accepted, parts)


@contextlib.contextmanager
def serve_loops(
    tools: LlamaTools,
    models: Path,
    names: Sequence[str],
    *,
    dtype: str,
    threads: int,
    max_new_tokens: int,
    draft_length: int,
    progress: Callable[[str], None],
) -> Iterator[list[LlamaLoop]]:
    """The loops of these names, each at a server of its own that runs until the block ends. Raises PeerError."""
    server = tools.server()
    progress("llama.cpp: converting")
    target = tools.converted(models / "target", dtype)
    flags = ["--model", str(target), "--threads", str(threads), "--ctx-size", "4096", "--parallel", "1"]
    if dtype == "fp32":
        flags += ["--cache-type-k", "f32", "--cache-type-v", "f32"]
    loops = []
    with contextlib.ExitStack() as stack:
        for name in names:
            more = []
            if name == "llama-draft":
                more = _draft_flags(server, tools.converted(models / "draft", dtype), draft_length)
                more += ["--threads-draft", str(threads)]
            port = stack.enter_context(_running(server, [*flags, *more], progress))
            # Its own proposals may end early.
            loops.append(LlamaLoop(name, port, max_new_tokens, None))
        yield loops


def _draft_flags(server: Path, draft: Path, draft_length: int) -> list[str]:
    """As many proposals in every round, however unsure the draft is; the flags have changed their names."""
    told = subprocess.run([str(server), "--help"], capture_output=True, text=True, check=False).stdout
    flags = ["--model-draft", str(draft)]
    if "--spec-draft-n-max" in told:
        return [
            *(*flags, "--spec-type", "draft-simple", "--spec-draft-n-max", str(draft_length)),
            *("--spec-draft-n-min", "0", "--spec-draft-p-min", "0"),
        ]
    return [*flags, "--draft-max", str(draft_length), "--draft-min", "0", "--draft-p-min", "0"]


@contextlib.contextmanager
def _running(server: Path, flags: Sequence[str], progress: Callable[[str], None]) -> Iterator[int]:
    """A server on a free loopback port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [str(server), "--host", "127.0.0.1", "--port", str(port), *flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            progress("llama.cpp: loading")
            until = time.monotonic() + _PATIENCE
            while not _serves(port):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    words = log.read().decode(errors="replace").strip().splitlines()
                    raise PeerError(f"llama-server does not serve: {words[-1] if words else 'no output'}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _serves(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False


def _post(connection: http.client.HTTPConnection, path: str, message: object) -> tuple[int, dict[str, Any]]:
    connection.request("POST", path, json.dumps(message), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())
