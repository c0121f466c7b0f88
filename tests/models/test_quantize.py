"""Quantized layers: they are near what they replace, a row stands for itself, and what does not fit is refused."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
from torchao.quantization.quantize_.workflows import Int4PackingFormat
from transformers import GPT2Config, GPT2LMHeadModel

from specpair.errors import ModelLoadError
from specpair_runtime.models import options as options_module
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.lean import prepare
from specpair_runtime.models.loading import LoadOptions, load_model
from specpair_runtime.models.options import check_available, quantization_config
from specpair_runtime.models.quantize import (
    INT4_GROUP,
    DynamicInt8Linear,
    Int4Linear,
    Int8Linear,
    quantize_linears,
)
from specpair_runtime.models.serving_model import load_serving_model
from specpair_runtime.serving import ServiceStatus

from ..tiny import random_ids

# The class, and the error that its rounding may make in a product of normal numbers.
LAYERS = {"int8wo": (Int8Linear, 0.02), "int4wo": (Int4Linear, 0.15), "int8dyn": (DynamicInt8Linear, 0.02)}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers in bf16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def relative(wrong: torch.Tensor, right: torch.Tensor) -> float:
    """The error's norm over the norm."""
    return float((wrong.double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(128,), (8, 128), (3, 8, 128), (1, 100, 128)], ids=str)
def test_a_layer_is_near_the_one_it_replaces(name, biased, shape):
    """For any number of rows and dimensions, with and without a bias, in the format of the inputs."""
    made, tolerance = LAYERS[name]
    weight, inputs = drawn(64, 128), drawn(*shape, seed=1)
    bias = drawn(64, seed=2) if biased else None
    outputs = made(weight, bias)(inputs)
    assert outputs.dtype == torch.bfloat16
    assert outputs.shape == (*shape[:-1], 64)
    assert relative(outputs, torch.nn.functional.linear(inputs, weight, bias)) < tolerance


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [4, 8, 16])
def test_the_bits_of_a_row_do_not_depend_on_the_others(name, rows):
    """A row of a block has the same bits at every place, in a step of one session and of four, next to rows of any
    size: that is what equal output rests on."""
    layer = LAYERS[name][0](drawn(64, 128), None)
    block = drawn(rows, 128, seed=1)
    expected = layer(block[None])[0]
    louder = torch.stack([drawn(rows, 128, seed=2) * 100, block, drawn(rows, 128, seed=3), drawn(rows, 128, seed=4)])
    assert torch.equal(layer(louder)[1], expected)
    for shift in range(1, rows):
        assert torch.equal(layer(block.roll(shift, 0)[None])[0], expected.roll(shift, 0))


def test_int8dyn_has_the_same_bits_at_every_width():
    """Sums of integers are exact: one row alone, in a block and in a prefill is the same, joined with others or not."""
    first, second = (DynamicInt8Linear(drawn(size, 128, seed=size), drawn(size, seed=3)) for size in (64, 32))
    inputs = drawn(100, 128, seed=1)
    expected = first(inputs)
    for width in (1, 3, 8):
        assert torch.equal(first(inputs[:width]), expected[:width])
    plain = DynamicInt8Linear(drawn(16, 128), None)
    joined = DynamicInt8Linear.joined([first, second, plain])
    assert torch.equal(joined(inputs), torch.cat([first(inputs), second(inputs), plain(inputs)], dim=-1))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_int8dyn_takes_rows_of_any_size(scale):
    """Scales follow the row, and a row of zeros gives zeros; what is no number stays none, in its own row only."""
    layer = DynamicInt8Linear(drawn(64, 128).float(), None)
    inputs = drawn(2, 128, seed=1).float() * scale
    right = torch.nn.functional.linear(inputs, drawn(64, 128).float())
    assert torch.equal(layer(inputs), right) if scale == 0 else relative(layer(inputs), right) < 0.02
    inputs[0, 5] = torch.nan
    assert layer(inputs)[0].isnan().all()
    assert not layer(inputs)[1].isnan().any()


def test_without_vnni_inputs_have_seven_bits(monkeypatch):
    """The sum of two products then stays within 16 bits, at twice the rounding."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    weight, inputs = drawn(64, 128).float(), drawn(8, 128, seed=1).float()
    layer = DynamicInt8Linear(weight, None)
    assert relative(layer(inputs), torch.nn.functional.linear(inputs, weight)) < 0.03
    assert 2 * (2 * layer._levels + 1) * 127 < 2**15


def served(tiny, name: str, **options: object):
    """A tiny model as a service has it, and logits of a block behind a prompt."""
    settings = {"dtype": "bf16", "device": "cpu", "slots": 2, "max_length": 100, "threads": 1, **options}
    model = load_serving_model(ModelConfig(model=tiny.path(name), **settings), [4], ServiceStatus())
    ids = random_ids(24)
    model.runner.prefill(0, ids[:20], 0)
    return model, model.runner.logits(0, torch.tensor([ids[20:]]), torch.tensor([20]), model.runner.bucket(20, 4))[0]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lean", [True, False])
def test_a_model_is_served_in_every_format(tiny, name, lean):
    """All linear layers but the head are replaced; the logits stay near, and the parameters are still counted."""
    plain, expected = served(tiny, "llama-blocks")
    quantized, logits = served(tiny, "llama-blocks", quantization=name, lean=lean)
    assert relative(logits, expected) < 5 * LAYERS[name][1]
    assert quantized.loaded.parameters == plain.loaded.parameters
    assert quantized.loaded.quantization == name
    model = quantized.loaded.model
    assert isinstance(model.model.layers[0].mlp.down_proj, LAYERS[name][0])
    assert not isinstance(model.get_output_embeddings(), LAYERS[name][0])


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_every_format_compiles_as_one_graph(tiny, name):
    """A compiled step has the logits of the uncompiled one up to rounding, and is not compiled again."""
    # In bf16 another order of sums moves inputs across the borders of int8; in fp32 hardly any.
    dtype, tolerance = ("fp32", 0.005) if name == "int8dyn" else ("bf16", 0.05)
    _, expected = served(tiny, "llama-blocks", quantization=name, dtype=dtype)
    compiled, logits = served(tiny, "llama-blocks", quantization=name, dtype=dtype, compile="on", slots=1)
    assert relative(logits, expected) < tolerance
    assert compiled.recompilations.count == 0


def test_gpt2_whose_weights_lie_the_other_way(tiny):
    """Conv1D is a linear layer with its weight transposed."""
    _, expected = served(tiny, "gpt2")
    _, logits = served(tiny, "gpt2", quantization="int8dyn")
    assert relative(logits, expected) < 0.1


def test_a_model_without_linear_layers_is_refused():
    """Nothing to quantize is no success."""
    config = GPT2Config(vocab_size=8, n_embd=8, n_layer=0, n_head=1, n_positions=8)
    with pytest.raises(ModelLoadError, match="no linear layers") as refused:
        quantize_linears(GPT2LMHeadModel(config), "int8dyn")
    assert refused.value.field == "quantization"


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("llama", {"quantization": "int4wo"}, "groups of 64"),
        ("llama", {"quantization": "int4wo", "dtype": "fp32"}, "needs bf16"),
        ("llama", {"quantization": "int8wo", "dtype": "fp16"}, "needs bf16"),
        ("llama", {"quantization": "int8dyn", "double_quantization": True}, "nf4"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_at_load(tiny, model, options, reason):
    """Sizes and formats that a kernel does not know end the load, naming the option."""
    with pytest.raises(ModelLoadError, match=reason) as refused:
        load_model(LoadOptions(**{"model": tiny.path(model), "device": "cpu", **options}))
    assert refused.value.field in ("quantization", "double_quantization")


@pytest.mark.parametrize(
    ("name", "package"),
    [("int8", "bitsandbytes"), ("nf4", "bitsandbytes"), ("int8wo", "torchao"), ("int4wo", "torchao")],
)
def test_a_package_that_is_missing_is_named(tiny, monkeypatch, name, package):
    """A format whose package is not installed is refused by the package's name."""
    monkeypatch.setattr(options_module, "find_spec", lambda wanted: None if wanted == package else object())
    with pytest.raises(ModelLoadError, match=package) as refused:
        load_model(LoadOptions(tiny.path("llama"), device="cpu", quantization=name))
    assert refused.value.field == "quantization"


@pytest.mark.parametrize(
    ("name", "kind"), [("int8wo", Int8WeightOnlyConfig), ("int4wo", Int4WeightOnlyConfig)], ids=["int8wo", "int4wo"]
)
def test_on_cuda_torchao_quantizes_while_it_loads(name, kind):
    """There torchao's own layers are used, in the layout of its 4-bit kernel; on a CPU they are made after loading."""
    config = quantization_config(LoadOptions("m", quantization=name), torch.device("cuda"))
    assert type(config.quant_type) is kind
    if name == "int4wo":
        assert config.quant_type.group_size == INT4_GROUP
        assert config.quant_type.int4_packing_format == Int4PackingFormat.TILE_PACKED_TO_4D
    assert quantization_config(LoadOptions("m", quantization=name), torch.device("cpu")) is None


def test_int8dyn_is_for_a_cpu():
    """On CUDA it is refused by name, before anything is loaded."""
    with pytest.raises(ModelLoadError, match="CPU only") as refused:
        check_available(LoadOptions("m", quantization="int8dyn"), torch.device("cuda"))
    assert refused.value.field == "quantization"


def test_joined_layers_are_those_of_the_model(tiny):
    """The lean decoder joins int8dyn layers that read the same input; the model's own code goes on with its parts."""
    loaded = load_model(LoadOptions(tiny.path("llama-blocks"), device="cpu", quantization="int8dyn"))
    layer = loaded.model.model.layers[0].mlp
    inputs = drawn(1, 3, 64)
    expected = [layer.gate_proj(inputs), layer.up_proj(inputs)]
    assert prepare(loaded.model, positions=64, rows=4, pack=True) is not None
    assert torch.equal(torch.cat([layer.gate_proj(inputs), layer.up_proj(inputs)]), torch.cat(expected))
