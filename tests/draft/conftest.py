"""Draft engines on tiny models."""

from __future__ import annotations

import pytest

from specpair_draft.config import DraftConfig
from specpair_draft.engine import Engine
from specpair_runtime.serving import ServiceStatus

SLOTS = 4
MAX_LENGTH = 300
CHUNK = 32


@pytest.fixture(scope="session")
def load(tiny):
    """Loads an engine on a tiny model, `load(name, **config)`; all of them stop with the session."""
    engines = []

    def start(name, **config):
        defaults = {
            "dtype": "fp32",
            "device": "cpu",
            "slots": SLOTS,
            "max_length": MAX_LENGTH,
            "prefill_chunk": CHUNK,
            "threads": 1,
        }
        engines.append(Engine.load(DraftConfig(model=tiny.path(name), **{**defaults, **config}), ServiceStatus()))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="session")
def engine(load):
    """An engine that tests share."""
    return load("llama-small")
