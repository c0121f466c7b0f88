"""Engines on tiny models."""

from __future__ import annotations

import pytest

from specpair_runtime.serving import ServiceStatus
from specpair_target.config import TargetConfig
from specpair_target.engine import Engine


@pytest.fixture(scope="session")
def load(tiny):
    """Loads an engine on a tiny model, `load(name, **config)`; all of them stop with the session."""
    engines = []

    def start(name, **config):
        defaults = {
            "dtype": "fp32",
            "device": "cpu",
            "slots": 8,
            "max_length": 384,
            "prefill_chunk": 32,
            "threads": 1,
            "queue_timeout": 60.0,
        }
        engines.append(Engine.load(TargetConfig(model=tiny.path(name), **{**defaults, **config}), ServiceStatus()))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="session")
def engine_of(load):
    """An engine that tests share, `engine_of(name, **config)`: one for each model and configuration."""
    engines = {}

    def shared(name, **config):
        key = (name, *sorted(config.items()))
        if key not in engines:
            engines[key] = load(name, **config)
        return engines[key]

    return shared
