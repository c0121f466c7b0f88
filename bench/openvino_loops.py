"""OpenVINO GenAI on the same weights and prompt ids, in a Python environment of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversions import PEERS, PeerError, convert, run
from measuring import Generation

__all__ = ["NAMES", "OpenvinoLoop", "serve_loops"]

NAMES = ("openvino-alone", "openvino-draft")
_PRECISIONS = {"bf16": "bf16", "fp32": "f32"}


@dataclass(frozen=True)
class OpenvinoLoop:
    """A worker process that continues prompts: greedy, a fixed number of new tokens, the end of sequence ignored.

    The seconds are the worker's own, so that what is passed to it and back costs nothing.
    """

    name: str
    worker: subprocess.Popen[str]
    max_new_tokens: int
    draft_length: int | None

    def run(self, prompt: Sequence[int]) -> Generation:
        """Continues a prompt and times it. Raises PeerError if the worker does not do as it is told."""
        answer = _ask(self.worker, {"prompt": list(prompt), "max_new_tokens": self.max_new_tokens})
        tokens = tuple(answer["token_ids"])
        if len(tokens) != self.max_new_tokens:
            raise PeerError(f"OpenVINO answered with {len(tokens)} tokens")
        proposed = answer["rounds"] * self.draft_length if self.draft_length else 0
        return Generation(tokens, answer["seconds"], answer["rounds"], proposed, answer["accepted"])


@contextlib.contextmanager
def serve_loops(
    python: Path | None,
    models: Path,
    names: Sequence[str],
    *,
    dtype: str,
    threads: int,
    max_new_tokens: int,
    draft_length: int,
    progress: Callable[[str], None],
) -> Iterator[list[OpenvinoLoop]]:
    """The loops of these names, each with a worker of its own that runs until the block ends. Raises PeerError."""
    if python is None:
        raise PeerError("--openvino-python names an interpreter that has it")
    progress("OpenVINO: converting")
    target = _converted(python, models / "target")
    loops = []
    with contextlib.ExitStack() as stack:
        for name in names:
            length = draft_length if name == "openvino-draft" else None
            options = {
                "target": str(target),
                "draft": str(_converted(python, models / "draft")) if length else None,
                "precision": _PRECISIONS[dtype],
                "threads": threads,
                "draft_length": length,
            }
            progress(f"OpenVINO: loading {name}")
            worker = stack.enter_context(_working(python, options))
            loops.append(OpenvinoLoop(name, worker, max_new_tokens, length))
        yield loops


def _converted(python: Path, checkpoint: Path) -> Path:
    def make(place: Path) -> None:
        run([str(python), str(PEERS / "to_openvino.py"), str(checkpoint.resolve()), str(place)])

    return convert(checkpoint, "openvino", make)


@contextlib.contextmanager
def _working(python: Path, options: object) -> Iterator[subprocess.Popen[str]]:
    """A worker that has loaded its models."""
    worker = subprocess.Popen(
        [str(python), str(PEERS / "openvino_worker.py"), json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        _answer(worker)
        yield worker
    finally:
        assert worker.stdin is not None
        with contextlib.suppress(OSError):
            worker.stdin.close()
        try:
            worker.wait(10)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        assert worker.stdout is not None
        worker.stdout.close()


def _ask(worker: subprocess.Popen[str], message: object) -> dict[str, Any]:
    assert worker.stdin is not None
    with contextlib.suppress(OSError):  # a worker that has ended answers nothing
        print(json.dumps(message), file=worker.stdin, flush=True)
    return _answer(worker)


def _answer(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that is an object; the libraries print lines of their own."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise PeerError("the OpenVINO worker has ended")
