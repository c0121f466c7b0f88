"""`--profile`: a trace of the first engine steps."""

from __future__ import annotations

import json

import torch

from specpair_runtime.models.profiling import StepProfiler, Unprofiled, profiler_of
from specpair_runtime.serving import ServiceConfig


def steps(profiler, count):
    for _ in range(count):
        with profiler.step("verify"):
            torch.ones(2) + 1


def trace(directory):
    (path,) = directory.iterdir()
    return [event["name"] for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def test_a_trace_has_the_steps_and_their_operations(tmp_path):
    """After a few steps that are left out, as many as asked for are recorded, each with what it consists of."""
    profiler = StepProfiler(str(tmp_path / "traces"), "target", 5)
    steps(profiler, 30)
    names = trace(tmp_path / "traces")
    assert names.count("verify") == 5
    assert names.count("aten::add") == 5


def test_an_engine_that_stops_early_leaves_what_there_is(tmp_path):
    """What was recorded until the engine stops is written, once; nothing if it was not even warm."""
    profiler = StepProfiler(str(tmp_path), "draft", 1000)
    steps(profiler, 23)
    profiler.close()
    profiler.close()
    assert trace(tmp_path).count("verify") == 3
    cold = StepProfiler(str(tmp_path / "none"), "draft", 5)
    steps(cold, 2)
    cold.close()
    assert not (tmp_path / "none").exists()


def test_nothing_is_recorded_unless_asked_for(tmp_path):
    """Without --profile the engine's steps are not touched."""
    assert isinstance(profiler_of(ServiceConfig(), "target"), Unprofiled)
    assert isinstance(profiler_of(ServiceConfig(profile=str(tmp_path)), "target"), StepProfiler)
