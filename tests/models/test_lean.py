"""The lean decoder and prepared weights: the model's own numbers, from fewer operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.packing import JoinedLinear, PackedLinear, pack_linears
from specpair_runtime.models.serving_model import ServingModel, load_serving_model
from specpair_runtime.serving import ServiceStatus

from ..tiny import random_ids
from .families import save_family

PROMPT = 100
WIDTH = 8
LEAN = ("Llama", "Mistral", "Mistral, sliding window", "Qwen2", "Qwen2, sliding layers", "Qwen3")
# Families that go their own way, of which nothing may be taken for granted.
OTHERS = ("Gemma 2", "GPT-2", "Phi-3")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A function that loads a family's tiny model."""
    root = tmp_path_factory.mktemp("families")
    paths: dict[str, str] = {}

    def loaded(family: str, **options: object) -> ServingModel:
        if family not in paths:
            paths[family] = save_family(family, root)
        given = {"dtype": "fp32", "device": "cpu", "slots": 4, "max_length": 200, "threads": 1, **options}
        return load_serving_model(ModelConfig(model=paths[family], **given), [WIDTH], ServiceStatus())

    return loaded


def step(model: ServingModel) -> torch.Tensor:
    """Logits of a step of four sessions at different positions."""
    runner = model.runner
    starts = torch.tensor([PROMPT - 11 * slot for slot in range(4)])
    for slot, start in enumerate(starts.tolist()):
        runner.prefill(slot, random_ids(start, seed=slot), 0)
    rows = torch.tensor([random_ids(WIDTH, seed=slot + 9) for slot in range(4)])
    return runner.logits(0, rows, starts, runner.bucket(PROMPT, WIDTH)).float()


@pytest.mark.parametrize("family", LEAN)
def test_the_lean_decoder_computes_what_the_model_computes(load, family):
    """Families that the lean decoder knows get its logits: the model's own in fp32, and in bf16 no further from those
    than the model's own in bf16 are.
    """
    lean, own = load(family), load(family, lean=False)
    assert lean.lean
    assert not own.lean
    truth = step(own)
    assert (step(lean) - truth).norm() < 1e-5 * truth.norm()
    rounded = {on: step(load(family, dtype="bf16", lean=on)) - truth for on in (True, False)}
    assert rounded[True].norm() < 1.3 * rounded[False].norm()


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_run_in_their_own_code(load, family):
    """What the lean decoder does not know is left to transformers, with packed layers: the same logits."""
    packed, own = load(family), load(family, lean=False)
    assert not packed.lean
    assert any(isinstance(module, PackedLinear) for module in packed.loaded.model.modules()) or family == "GPT-2"
    assert (step(packed) - step(own)).norm() < 1e-5 * step(own).norm()


def test_the_number_of_parameters_is_the_checkpoints(load):
    """Preparing weights changes nothing in what is reported of the model."""
    assert load("Llama").loaded.parameters == load("Llama", lean=False).loaded.model.num_parameters()


@pytest.mark.parametrize("rows", [1, 3, 8, 64])
def test_packed_layers_have_the_same_bits_in_bf16(rows):
    """oneDNN's layout of a weight changes the time of a product, not its value."""
    layer = nn.Linear(96, 160).to(torch.bfloat16)
    inputs = torch.randn(2, rows, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(PackedLinear(layer.weight, layer.bias, 8)(inputs), layer(inputs))


@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_are_kept_once(bias):
    """Joined layers give their outputs side by side, each alone through its part, over one weight."""
    layers = [nn.Linear(32, outputs, bias=bias) for outputs in (24, 8, 8)]
    inputs = torch.randn(1, 5, 32)
    with torch.inference_mode():
        expected = [layer(inputs) for layer in layers]
        joined = JoinedLinear(layers, rows=8, pack=True)
        assert torch.allclose(joined(inputs), torch.cat(expected, dim=-1), atol=1e-6)
        for part, alone in zip(joined.parts, expected, strict=True):
            assert torch.allclose(part(inputs), alone, atol=1e-6)
            assert not list(part.parameters())


class _Doubled(nn.Module):
    """A layer of another kind, as quantized ones are."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * 2


def test_layers_of_other_kinds_are_joined_by_calling_them():
    """A layer that is no plain linear one is called as it is, and is never packed."""
    layers = [nn.Linear(8, 4), _Doubled()]
    joined = JoinedLinear(layers, rows=8, pack=True)
    inputs = torch.randn(1, 3, 8)
    assert torch.equal(joined(inputs), torch.cat([layers[0](inputs), inputs * 2], dim=-1))
    model = nn.Sequential(_Doubled(), nn.Linear(8, 8))
    pack_linears(model, 8)
    assert [type(layer) for layer in model] == [_Doubled, PackedLinear]
