"""What a target says of all that decides its output besides the request."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from specpair_runtime.models import output_identity


def test_what_changes_bits_changes_the_identity(load, engine_of):
    """Two engines of one configuration have the same; other rows per step or prefill, formats, attention, lengths,
    other weights, another decoder, or steps of one size have another one. How many slots there are makes no difference
    otherwise.
    """
    own = engine_of("llama").identity
    assert load("llama").identity == own == load("llama", slots=3, step_tokens=64).identity
    changes = (
        {"verify_width": 4},
        {"prefill_chunk": 16},
        {"dtype": "bf16"},
        {"attn_implementation": "eager"},
        {"sdpa_backend": "math"},
        {"deterministic": True},
        {"deterministic": True, "slots": 3},
        {"max_length": 256},
        {"lean": False},
    )
    others = [load("llama", **change).identity for change in changes]
    assert len({own, engine_of("mistral").identity, *others}) == 2 + len(changes)


@pytest.mark.parametrize("what", [(output_identity, "machine_key"), (importlib.metadata, "version")])
def test_another_processor_or_version_changes_the_identity(load, engine_of, monkeypatch, what):
    """Services on machines with other instructions, or of another version, do not say that they are the same."""
    own = engine_of("llama").identity
    monkeypatch.setattr(*what, lambda *_: "another")
    assert load("llama").identity != own


def test_another_process_has_the_same_identity(load, tiny):
    """It depends on nothing of the process that computes it: not on the order of sets, and not on what ran before."""
    code = """
import sys
from specpair_runtime.serving import ServiceStatus
from specpair_target.config import TargetConfig
from specpair_target.engine import Engine
config = TargetConfig.parse(sys.argv[1:])
print(Engine.load(config, ServiceStatus()).identity)
"""
    flags = ["--dtype=fp32", "--device=cpu", "--slots=2", "--max-length=384", "--prefill-chunk=32", "--threads=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, f"--model={tiny.path('llama')}", *flags],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == [load("llama", slots=2).identity]
