"""A model's directory is data: whatever lies in it, none of its code runs."""

from __future__ import annotations

import json
import shutil

import pytest

from specpair.errors import ModelLoadError
from specpair_runtime.models.loading import load_config, load_model
from specpair_runtime.models.options import LoadOptions
from specpair_runtime.models.tokenizers import load_tokenizer

from ..tiny import tiny_tokenizer

_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({trace!r}).write_text("executed")
class Config(LlamaConfig):
    model_type = {family!r}
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def trace(tmp_path):
    """A file that exists when the code of a model has run."""
    return tmp_path / "trace"


@pytest.fixture
def homemade(tiny, tmp_path, trace):
    """Makes a copy of a tiny Llama that brings its own classes for config, model and tokenizer."""

    def make(family):
        place = tmp_path / "homemade"
        shutil.copytree(tiny.path("llama"), place)
        (place / "own.py").write_text(_CODE.format(trace=str(trace), family=family))
        own = {
            "AutoConfig": "own.Config",
            "AutoModelForCausalLM": "own.Model",
            "AutoTokenizer": ["own.Tokenizer", None],
        }
        for name, more in (("config.json", {"model_type": family}), ("tokenizer_config.json", {})):
            path = place / name
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**content, **more, "auto_map": own}))
        return place

    return make


def test_the_code_would_run_if_it_were_trusted(homemade, trace):
    """The trap works: transformers runs the code of this directory when it is told to trust it."""
    from transformers import AutoConfig

    AutoConfig.from_pretrained(homemade("homemade"), trust_remote_code=True)
    assert trace.exists()


def test_an_unknown_family_with_code_is_refused(homemade, trace):
    """A model of a family that only its own code knows is refused, and the code does not run."""
    place = str(homemade("homemade"))
    for load in (load_config, lambda path: load_model(LoadOptions(path))):
        with pytest.raises(ModelLoadError) as refused:
            load(place)
        assert refused.value.field == "model"
    assert not trace.exists()


def test_a_known_family_loads_without_the_code(homemade, trace):
    """Where transformers knows the family, its own classes load the model, whatever the directory offers."""
    loaded = load_model(LoadOptions(str(homemade("llama"))))
    assert type(loaded.model).__module__.startswith("transformers.")
    assert not trace.exists()


def test_a_tokenizer_with_code_does_not_run_it(homemade, trace):
    """A tokenizer that brings its own class is loaded by one that transformers knows; its code does not run."""
    place = homemade("llama")
    config = json.loads((place / "tokenizer_config.json").read_text())
    tiny_tokenizer().save_pretrained(place)
    saved = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**saved, "auto_map": config["auto_map"]}))
    tokenizer = load_tokenizer(str(place))
    assert type(tokenizer).__module__.startswith("transformers.")
    assert not trace.exists()
