"""What was compiled is kept: where, for whom, and that a second start compiles nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from specpair.errors import ModelLoadError
from specpair_runtime.models.compile_cache import keep_compiled, machine_key

INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The variable and the switch of torch as they were; the variable is unset during a test."""
    monkeypatch.setenv(INDUCTOR, "")
    monkeypatch.delenv(INDUCTOR)
    before = torch.compiler.config.force_disable_caches
    yield
    torch.compiler.config.force_disable_caches = before


@pytest.mark.parametrize("given", ["auto", "directory"])
def test_there_is_a_directory_for_this_torch_and_processor(monkeypatch, tmp_path, given):
    """auto is below XDG_CACHE_HOME; either way inductor is told a directory named after torch, that is the user's
    alone even where every other one may be shared."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(0o002)
    try:
        place = keep_compiled("auto" if given == "auto" else str(tmp_path / "mine"))
    finally:
        os.umask(before)
    assert place.parent == (tmp_path / "cache/specpair/compiled" if given == "auto" else tmp_path / "mine")
    assert place.name == machine_key()
    assert torch.__version__ in place.name
    assert os.environ[INDUCTOR] == str(place)
    assert place.stat().st_mode & 0o777 == 0o700


def test_auto_follows_the_variable_of_torch(monkeypatch, tmp_path):
    """Who has told torch a directory already keeps it, unless the option names another."""
    monkeypatch.setenv(INDUCTOR, str(tmp_path))
    assert keep_compiled("auto") == tmp_path
    assert keep_compiled(str(tmp_path / "other")).parent == tmp_path / "other"


def test_auto_does_not_take_the_default_of_torch_for_a_choice(monkeypatch, tmp_path):
    """torch writes its default, a directory that a restart empties, into the variable by itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(INDUCTOR, raising=False)
    cache_dir()
    assert keep_compiled("auto").parent == tmp_path / "specpair/compiled"


def test_off_keeps_nothing_and_uses_nothing(monkeypatch, tmp_path):
    """off turns torch's caches off, and a later start in the same process turns them on again."""
    assert keep_compiled("off") is None
    assert torch.compiler.config.force_disable_caches
    assert INDUCTOR not in os.environ
    keep_compiled(str(tmp_path))
    assert not torch.compiler.config.force_disable_caches


def test_a_directory_that_others_may_write_to_is_refused(tmp_path):
    """Compiled code is run as it is, so nobody else may put some there."""
    (tmp_path / machine_key()).mkdir()
    (tmp_path / machine_key()).chmod(0o777)
    with pytest.raises(ModelLoadError, match="others may write") as refused:
        keep_compiled(str(tmp_path))
    assert refused.value.field == "compile_cache"


def test_a_file_instead_of_a_directory_is_refused(tmp_path):
    """What cannot be a directory is refused by the option's name, at the start."""
    (tmp_path / "file").touch()
    with pytest.raises(ModelLoadError) as refused:
        keep_compiled(str(tmp_path / "file"))
    assert refused.value.field == "compile_cache"


def test_a_service_without_a_home_starts_all_the_same(monkeypatch, tmp_path):
    """Where auto has no place nothing is set, and torch decides; a directory that was asked for is not replaced."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_compiled("auto") is None
    assert INDUCTOR not in os.environ


START = """
import json, sys, torch
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.serving_model import load_serving_model
from specpair_runtime.serving import ServiceStatus
model, artifacts, slots = sys.argv[1:]
config = ModelConfig(model=model, dtype="fp32", device="cpu", slots=slots, max_length=64, threads=1,
                     compile="on", compile_cache=artifacts)
runner = load_serving_model(config, [4], ServiceStatus()).runner
runner.prefill(0, list(range(9)), 0)
logits = runner.logits(0, torch.tensor([[3, 1, 4, 1]]), torch.tensor([9]), runner.bucket(9, 4))
counters = torch._dynamo.utils.counters
found = counters["inductor"]["fxgraph_cache_hit"]
print(json.dumps([logits.sum(-1).tolist(), counters["stats"]["unique_graphs"], found]))
"""


def start(model: str, artifacts: Path, slots: int = 1) -> subprocess.Popen[str]:
    """A process that loads and compiles, and prints logits, how many graphs it has, and how many it found."""
    arguments = [sys.executable, "-c", START, model, str(artifacts), str(slots)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def ready(process: subprocess.Popen[str]) -> list:
    """What a start printed."""
    output, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_a_second_start_compiles_nothing(tiny, tmp_path):
    """Two services start at once with an empty directory, a third finds all its graphs there; all compute the same.
    A model of another shape finds none of them."""
    both = [start(tiny.path("llama-small"), tmp_path) for _ in range(2)]
    (logits, graphs, _), (same, *_) = [ready(process) for process in both]
    again, graphs_again, found = ready(start(tiny.path("llama-small"), tmp_path))
    assert logits == same == again
    assert graphs == graphs_again == found > 0
    other, _, found = ready(start(tiny.path("llama"), tmp_path))
    assert other != logits
    assert found == 0
