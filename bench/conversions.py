"""Checkpoints in the formats of other runtimes, made once and kept below runs/peers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

__all__ = ["PEERS", "PeerError", "convert", "run"]

PEERS = Path(__file__).parent / "peers"
"""Scripts that run in other environments than this one."""
_KEPT = Path("runs/peers")


class PeerError(Exception):
    """A peer cannot be measured; the message says why. Nothing of this project depends on one."""


def convert(checkpoint: Path, suffix: str, make: Callable[[Path], None]) -> Path:
    """The conversion of `checkpoint`, a directory such as models/demo/target, whose name ends in `suffix`.

    `make` writes it to the path that it is given unless there is one that is not older than the weights.
    """
    kept = _KEPT / checkpoint.resolve().parent.name / f"{checkpoint.name}-{suffix}"
    newest = max(path.stat().st_mtime for path in checkpoint.glob("*.safetensors"))
    if kept.exists() and kept.stat().st_mtime >= newest:
        return kept
    draft = kept.with_name(f"unfinished-{kept.name}")
    for path in (draft, kept):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    draft.parent.mkdir(parents=True, exist_ok=True)
    make(draft.resolve())
    draft.rename(kept)
    return kept


def run(command: list[str], *, cwd: Path | None = None) -> None:
    """Runs a converter. Raises PeerError with its last words if it fails."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        words = done.stdout.strip().splitlines()
        raise PeerError(f"the conversion failed: {words[-1] if words else 'no output'}")
