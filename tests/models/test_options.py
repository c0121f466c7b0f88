"""Options of a model: what they do, and that nothing is silently ignored."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from specpair.errors import ModelLoadError
from specpair_runtime.models.attention import flash_over_cache, grouped_sdpa
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.loading import load_model
from specpair_runtime.models.masks import AttentionMasks
from specpair_runtime.models.options import LoadOptions
from specpair_runtime.models.runner import CompileOptions, ModelRunner
from specpair_runtime.models.serving_model import load_serving_model
from specpair_runtime.serving import ServiceStatus

from ..tiny import random_ids


def runner(tiny, name: str = "llama", **options: object) -> ModelRunner:
    """A warm runner of a tiny model with options of the services."""
    defaults = {"model": tiny.path(name), "dtype": "fp32", "device": "cpu", "slots": 4, "max_length": 300}
    return load_serving_model(ModelConfig(**{**defaults, **options}), [4], ServiceStatus()).runner


def logits_over_slot(model: ModelRunner) -> torch.Tensor:
    """Logits of a block behind a prefilled prompt."""
    ids = random_ids(44)
    model.prefill(1, ids[:40], 0)
    return model.logits(1, torch.tensor([ids[40:]]), torch.tensor([40]), model.bucket(40))[0]


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "qwen3-mixed", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [{"attn_implementation": "eager"}, {"attn_implementation": "flex_attention"}, {"sdpa_backend": "math"}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_every_attention_computes_the_same(tiny, name, options):
    """Whatever attention is chosen, logits are those of the default up to rounding."""
    expected = logits_over_slot(runner(tiny, name))
    torch.testing.assert_close(logits_over_slot(runner(tiny, name, **options)), expected, rtol=1e-4, atol=1e-3)


def reference_flash(query, key, value, *, cache_seqlens, softmax_scale, causal, window_size, softcap):
    """What `flash_attn_with_kvcache` documents: the last row sees cache_seqlens positions, those before it fewer."""
    assert causal
    assert softcap == 0.0
    rows, heads = query.shape[1:3]
    last = cache_seqlens[:, None].long() - rows + torch.arange(rows)  # position of each row
    columns = torch.arange(key.shape[1])
    seen = columns <= last[..., None]
    if window_size != (-1, -1):
        seen &= columns >= last[..., None] - window_size[0]
    groups = heads // key.shape[2]
    output = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2).repeat_interleave(groups, 1),
        value.transpose(1, 2).repeat_interleave(groups, 1),
        attn_mask=seen[:, None],
        scale=softmax_scale,
    )
    return output.transpose(1, 2)


@pytest.mark.parametrize("window", [None, 12])
def test_flash_attention_gets_each_slot_at_its_own_length(tiny, monkeypatch, window):
    """The lengths and the window given to FlashAttention describe what the additive mask describes."""
    module = ModuleType("flash_attn")
    module.flash_attn_with_kvcache = reference_flash
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    config = tiny.reference("llama").model.config.__class__(sliding_window=window)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 5, 8, generator=generator)
    key, value = torch.randn(2, 3, 2, 64, 8, generator=generator)
    positions = torch.tensor([[0], [17], [59]]) + torch.arange(5)
    dense = AttentionMasks(config, torch.float32).build(positions, 64)
    counts = AttentionMasks(config, torch.float32, counts_only=True).build(positions, 64)
    expected, _ = grouped_sdpa(torch.nn.Identity(), query, key, value, dense, scaling=0.3)
    flashed, _ = flash_over_cache(torch.nn.Identity(), query, key, value, counts, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(flashed, expected)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation"),
        ({"sdpa_backend": "cudnn"}, "sdpa_backend"),
        ({"sdpa_backend": "math", "attn_implementation": "eager"}, "sdpa_backend"),
        ({"device": "cuda:0"}, "device"),
        ({"device": "abacus"}, "device"),
        ({"double_quantization": True}, "double_quantization"),
        ({"quantization": "int8", "quantization_compute_dtype": "fp32"}, "quantization_compute_dtype"),
    ],
    ids=str,
)
def test_what_the_machine_does_not_have_is_refused_by_name(tiny, options, field):
    """An option that cannot be carried out here ends the load with the option's name, it is never ignored."""
    if torch.cuda.is_available() and field in ("attn_implementation", "device"):
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ModelLoadError) as refused:
        load_model(LoadOptions(**{"model": tiny.path("llama"), "device": "cpu", **options}))
    assert refused.value.field == field


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_checkpoint_that_is_quantized_already_keeps_its_own_quantization(tiny, tmp_path):
    """A checkpoint with a quantization config is loaded by it, and another quantization on top is refused."""
    options = LoadOptions(model=tiny.path("llama-blocks"), device="cpu", quantization="nf4", double_quantization=True)
    load_model(options).model.save_pretrained(tmp_path)
    again = load_model(LoadOptions(model=str(tmp_path), device="cpu"))
    assert again.quantization == "bitsandbytes"
    assert getattr(again.model.config, "quantization_config", None) is not None
    with pytest.raises(ModelLoadError) as refused:
        load_model(LoadOptions(model=str(tmp_path), device="cpu", quantization="int8"))
    assert refused.value.field == "quantization"


def test_a_checkpoint_that_torchao_saved_is_loaded_as_it_is(tiny, tmp_path):
    """Its layers stay torchao's, in the lean decoder too, with the logits that they had before they were saved."""
    config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    saved = AutoModelForCausalLM.from_pretrained(
        tiny.path("llama-blocks"), dtype=torch.bfloat16, quantization_config=config
    )
    saved.save_pretrained(tmp_path)
    again = load_model(LoadOptions(model=str(tmp_path), device="cpu"))
    assert again.quantization == "torchao"
    assert type(again.model.model.layers[0].mlp.up_proj.weight.data) is Int8Tensor
    again.model.set_attn_implementation("eager")
    ids = torch.tensor([random_ids(9)])
    with torch.inference_mode():
        torch.testing.assert_close(again.model(ids).logits, saved(ids).logits, rtol=0.02, atol=0.2)
    serving = runner(tiny, model=str(tmp_path), dtype="bf16")
    assert logits_over_slot(serving).isfinite().all()


def test_compile_options_follow_the_device(tiny):
    """auto compiles on CUDA with CUDA graphs and not on a CPU; modes and fullgraph are passed on."""
    config = ModelConfig(model="m")
    assert config.compile_options("cpu") is None
    assert config.compile_options("cuda") == CompileOptions("reduce-overhead", fullgraph=True)
    assert ModelConfig(model="m", compile="off").compile_options("cuda") is None
    on = ModelConfig(model="m", compile="on", compile_mode="max-autotune-no-cudagraphs", fullgraph=False)
    assert on.compile_options("cpu") == CompileOptions("max-autotune-no-cudagraphs", fullgraph=False)
    assert ModelConfig(model="m", compile="on").compile_options("cpu") == CompileOptions("default")


def test_a_deterministic_runner_always_takes_all_slots(tiny):
    """The shape of a deterministic step does not depend on who is there, and its logits are the usual ones."""
    always = runner(tiny, deterministic=True)
    assert {always.slot_range([slot]) for slot in range(4)} == {range(4)}
    ids = random_ids(44)
    always.prefill(1, ids[:40], 0)
    rows = torch.zeros((4, 4), dtype=torch.int64)
    rows[1] = torch.tensor(ids[40:])
    starts = torch.full((4,), always.parking)
    starts[1] = 40
    torch.testing.assert_close(always.logits(0, rows, starts, 256)[1], logits_over_slot(runner(tiny)))


@pytest.mark.parametrize("fault", ["bidirectional", "shifted"])
def test_a_model_that_computes_something_else_over_a_slot_is_refused(tiny, monkeypatch, fault):
    """The check at load finds a mask that shows too much and positions that are off by one."""
    if fault == "bidirectional":
        build = AttentionMasks.build
        monkeypatch.setattr(AttentionMasks, "build", lambda self, at, length: torch.zeros_like(build(self, at, length)))
    else:
        place = ModelRunner._positions
        monkeypatch.setattr(
            ModelRunner, "_positions", lambda self, ids, starts: place(self, ids, starts + (starts > 0))
        )
    with pytest.raises(ModelLoadError, match="does not run on a slot cache") as refused:
        runner(tiny)
    assert refused.value.field == "model"
