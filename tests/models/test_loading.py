"""Loading: what cannot be loaded is refused by the name of the option at fault; a vocabulary is known by its print."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GenerationConfig,
    MambaConfig,
    T5Config,
    ViTConfig,
)

from specpair.errors import ModelLoadError
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.loading import load_model
from specpair_runtime.models.options import LoadOptions
from specpair_runtime.models.serving_model import load_serving_model
from specpair_runtime.models.tokenizers import fingerprint, load_tokenizer
from specpair_runtime.serving import ServiceStatus

from ..tiny import VOCABULARY, tiny_tokenizer

_SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "initializer_range": 0.5}
_ENCODER = {**_SIZE, "num_attention_heads": 2, "intermediate_size": 16}


def refused(model: str, reason: str = ".", **options: object) -> str:
    """The option that a refusal names; it has a message of one line that contains the reason."""
    with pytest.raises(ModelLoadError, match=reason) as error:
        load_serving_model(ModelConfig(model=model, **options), [4], ServiceStatus())
    assert error.value.message
    assert "\n" not in error.value.message
    return error.value.field


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of a tiny model to spoil."""
    shutil.copytree(tiny.path("llama"), tmp_path / "copy")
    return tmp_path / "copy"


def test_weights_are_known_by_their_digest(copy):
    """The same for the same checkpoint, however often it is loaded; another one as soon as any tensor has other
    numbers."""
    first = load_model(LoadOptions(str(copy), dtype="fp32"))
    torch.manual_seed(99)
    assert load_model(LoadOptions(str(copy), dtype="fp32")).weights_sha256 == first.weights_sha256
    weights = load_file(copy / "model.safetensors")
    for name in weights:
        changed = {**weights, name: weights[name] + 1e-3}
        save_file(changed, copy / "model.safetensors", {"format": "pt"})
        assert load_model(LoadOptions(str(copy), dtype="fp32")).weights_sha256 != first.weights_sha256, name


@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4", "int8dyn", "int8wo"])
def test_quantized_weights_are_known_too(copy, quantization):
    """Whatever they are packed into: the same from load to load, another one for other weights of linear layers."""

    def digest():
        return load_model(LoadOptions(str(copy), quantization=quantization)).weights_sha256

    first = digest()
    assert digest() == first
    weights = load_file(copy / "model.safetensors")
    tuned = {name: tensor * -0.5 if "proj" in name else tensor for name, tensor in weights.items()}
    save_file(tuned, copy / "model.safetensors", {"format": "pt"})
    assert digest() != first


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "../nowhere", "~/nowhere", "no/such/directory"])
def test_a_directory_that_is_not_there(model):
    """It is refused at once as a directory: no hub is asked."""
    with pytest.raises(ModelLoadError, match="no such directory") as error:
        load_model(LoadOptions(model))
    assert error.value.field == "model"


def test_a_file_instead_of_a_directory(copy):
    """A model is named by its directory."""
    assert refused(str(copy / "config.json")) == "model"


def test_a_directory_without_a_model(tmp_path):
    """No config, no model."""
    assert refused(str(tmp_path)) == "model"


def test_a_model_without_weights(copy):
    """A config alone is not enough."""
    (copy / "model.safetensors").unlink()
    assert refused(str(copy)) == "model"


def test_damaged_weights(copy):
    """A file that is cut off is refused, not read as far as it goes."""
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert refused(str(copy)) == "model"


def test_a_config_that_is_not_json(copy):
    """A damaged config is refused."""
    (copy / "config.json").write_text("{")
    assert refused(str(copy)) == "model"


def test_weights_that_are_not_all_there(copy):
    """A checkpoint without some of its tensors is refused: the rest would be drawn at random."""
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert refused(str(copy), "lacks") == "model"


def test_pickled_weights_are_not_read(copy):
    """Weights that could execute code are refused even where there are no others."""
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    assert refused(str(copy)) == "model"


def test_code_of_a_model_is_not_run(copy):
    """A model that brings its own classes is refused without reading them."""
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text("raise SystemExit('executed')")
    assert refused(str(copy)) == "model"


@pytest.mark.parametrize(
    ("config", "auto_class", "reason"),
    [
        (T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), AutoModel, "encoder-decoder"),
        (MambaConfig(vocab_size=50, **_SIZE, state_size=4), AutoModelForCausalLM, "recurrent"),
        (ViTConfig(**_ENCODER), AutoModel, "ViTConfig"),
        (
            BertConfig(vocab_size=50, **_ENCODER),
            AutoModelForCausalLM,
            "come after",
        ),
    ],
    ids=["t5", "mamba", "vit", "bert"],
)
def test_a_model_of_the_wrong_kind(tmp_path, config, auto_class, reason):
    """Encoder-decoder and recurrent models, models that see what comes, and models of other things than text."""
    auto_class.from_config(config).save_pretrained(tmp_path)
    assert refused(str(tmp_path), reason) == "model"


@pytest.mark.parametrize("device", ["toaster", "cuda:-1", "cuda:0", ""])
def test_a_device_that_is_not_there(tiny, device):
    """Unknown devices, and CUDA where there is none."""
    if device == "cuda:0" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert refused(tiny.path("llama"), device=device) == "device"


def test_4_bit_weights_come_in_blocks(tiny):
    """A model whose layers do not divide into blocks of 64 weights is refused at load, not at the first request."""
    assert refused(tiny.path("llama"), quantization="nf4", device="cpu") == "model"


def test_the_cache_is_cut_to_what_the_model_knows(tiny):
    """A slot has as many positions as asked for, but no more than the model was made for."""
    for asked, got in ((100, 100), (4096, 512)):
        config = ModelConfig(model=tiny.path("llama"), max_length=asked, slots=1, device="cpu")
        assert load_serving_model(config, [8], ServiceStatus()).runner.max_length == got


# --- vocabulary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma", "opt", "gpt2"])
def test_without_a_tokenizer_all_rows_are_ids(tiny, family):
    """Where no tokenizer lies beside a model none is made up, and its vocabulary is its embedding matrix."""
    assert load_tokenizer(tiny.path(family)) is None
    known = fingerprint(tiny.reference(family).model, None)
    assert known.vocabulary_size == VOCABULARY
    assert (known.vocabulary_sha256, known.special_tokens_sha256, known.chat_template_sha256) == ("", "", "")


def test_padding_is_no_part_of_the_vocabulary(tiny):
    """Two models with the same tokenizer and differently padded matrices have the same print."""
    model, tokenizer = tiny.reference("llama-text").model, load_tokenizer(tiny.path("llama-text"))
    known = fingerprint(model, tokenizer)
    assert known.vocabulary_size == len(tokenizer) < model.config.vocab_size
    model.config.vocab_size += 64
    try:
        assert fingerprint(model, tokenizer) == known
    finally:
        model.config.vocab_size -= 64


def test_any_other_token_is_another_vocabulary(tiny):
    """One token more, or other special tokens, and the print is another one; loading again, it is the same."""
    model = tiny.reference("llama-text").model
    known = fingerprint(model, tiny_tokenizer())
    assert fingerprint(model, tiny_tokenizer()) == known
    larger, otherwise, templated = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    larger.add_tokens(["another"])
    assert fingerprint(model, larger).vocabulary_sha256 != known.vocabulary_sha256
    otherwise.pad_token = "</s>"
    assert fingerprint(model, otherwise).special_tokens_sha256 != known.special_tokens_sha256
    assert fingerprint(model, otherwise).vocabulary_sha256 == known.vocabulary_sha256
    templated.chat_template = "{{ messages }}"
    assert fingerprint(model, templated).chat_template_sha256 != known.chat_template_sha256 == ""


@pytest.mark.parametrize(
    ("configured", "expected"),
    [(7, (7,)), ([9, 7, 9], (7, 9)), (None, (tiny_tokenizer().eos_token_id,))],
    ids=["one", "several", "the tokenizer's"],
)
def test_end_of_sequence_ids_are_those_of_generate(tiny, monkeypatch, configured, expected):
    """The generation config decides; where it says nothing the tokenizer does."""
    model = tiny.reference("llama-text").model
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=configured))
    assert fingerprint(model, tiny_tokenizer()).eos_token_ids == expected


def test_paths_may_be_relative(tiny, monkeypatch):
    """A directory below the working directory is found without a slash in front."""
    path = Path(tiny.path("llama"))
    monkeypatch.chdir(path.parent)
    assert load_model(LoadOptions(path.name, device="cpu", dtype="fp32")).model.dtype == torch.float32
