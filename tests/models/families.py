"""Tiny random models of many families, saved as a hub would serve them.

`python -m tests.models.families [NAME ...]` in the root of the repository measures which of them compile without a
break in the graph: the table of docs/models.md. It takes minutes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.options import AttentionName
from specpair_runtime.models.serving_model import load_serving_model
from specpair_runtime.serving import ServiceStatus

from ..tiny import POSITIONS, VOCABULARY

# A window that prompts of any interest are longer than.
WINDOW = 24
# Weights drawn wide: the most probable token changes from step to step.
_WIDE = 0.5

_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": _WIDE,
    "tie_word_embeddings": False,
    **_NO_IDS,
}
_NO_GROUPS = {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

# Families that run, by the name under which the documentation lists them.
SERVED: dict[str, Callable[[], PreTrainedConfig]] = {
    "Llama": lambda: LlamaConfig(**_COMMON),
    "Mistral": lambda: MistralConfig(**_COMMON, sliding_window=None),
    "Mistral, sliding window": lambda: MistralConfig(**_COMMON, sliding_window=WINDOW),
    "Gemma": lambda: GemmaConfig(**{**_COMMON, "num_key_value_heads": 1}, head_dim=16),
    # Caps low enough to bend the scores.
    "Gemma 2": lambda: Gemma2Config(
        **_COMMON, **_ALTERNATING, head_dim=16, attn_logit_softcapping=5.0, final_logit_softcapping=20.0
    ),
    "Gemma 3 (text)": lambda: Gemma3TextConfig(**_COMMON, **_ALTERNATING, head_dim=16),
    "Qwen2": lambda: Qwen2Config(**_COMMON),
    "Qwen2, sliding layers": lambda: Qwen2Config(
        **_COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "Qwen3": lambda: Qwen3Config(**_COMMON, head_dim=16),
    "Phi-3": lambda: Phi3Config(**_COMMON, sliding_window=WINDOW),
    "OPT": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        init_std=_WIDE,
        tie_word_embeddings=False,
        **_NO_IDS,
    ),
    "GPT-2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        initializer_range=_WIDE,
        tie_word_embeddings=False,
        **_NO_IDS,
    ),
    "GPT-NeoX": lambda: GPTNeoXConfig(**_NO_GROUPS),
    "Mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "Qwen3-MoE": lambda: Qwen3MoeConfig(**_COMMON, **_EXPERTS, head_dim=16),
}
# Attention sinks: eager attention only.
GPT_OSS = "GPT-OSS"
# Other rotary frequencies once a position beyond SHORT is seen: served up to there.
LONG_ROPE, SHORT = "Phi-3, LongRoPE", 128
# A bias by distance instead of positions, built inside the model: not served.
BLOOM = "Bloom"
# Layers that look at chunks of the sequence: not served.
LLAMA_4 = "Llama 4 (text)"
# State that cannot be rolled back: not served.
RECURRENT: dict[str, Callable[[], PreTrainedConfig]] = {
    "Mamba": lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2, **_NO_IDS),
    "Jamba": lambda: JambaConfig(**_COMMON, num_experts=2, mamba_d_state=8, mamba_dt_rank=4),
    "Qwen3-Next": lambda: Qwen3NextConfig(**_COMMON, **_EXPERTS, head_dim=16),
    "LFM2": lambda: Lfm2Config(**_COMMON, layer_types=["conv", "full_attention"]),
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_LONG_ROPE = {
    **_ROPE,
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": POSITIONS / SHORT,
    "original_max_position_embeddings": SHORT,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    **SERVED,
    # Weights drawn so narrow that the sinks hardly matter.
    GPT_OSS: lambda: GptOssConfig(
        **{**_COMMON, **_ALTERNATING, "initializer_range": 0.05},
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters=_ROPE,
    ),
    LONG_ROPE: lambda: Phi3Config(**_COMMON, rope_parameters=_LONG_ROPE, original_max_position_embeddings=SHORT),
    BLOOM: lambda: BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=_WIDE, **_NO_IDS
    ),
    LLAMA_4: lambda: Llama4TextConfig(**_COMMON, head_dim=16, intermediate_size_mlp=48, num_local_experts=2),
    **RECURRENT,
}


def save_family(name: str, root: Path) -> str:
    """The directory of a family's model below `root`, made when it is not there."""
    path = root / name.replace(" ", "-")
    if not path.exists():
        torch.manual_seed(5)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]())
        model.generation_config = GenerationConfig(**_NO_IDS)
        model.save_pretrained(path)
    return str(path)


def compile_family(path: str, attention: AttentionName) -> str:
    """Compiles one step of a model in one graph; says how long it took and how far it is from the step as it is."""
    config = ModelConfig(
        model=path,
        attn_implementation=attention,
        dtype="fp32",
        device="cpu",
        slots=1,
        max_length=60,
        compile="on",
    )
    began = time.perf_counter()
    model = load_serving_model(config, [4], ServiceStatus())
    took = time.perf_counter() - began
    runner, ids, length = model.runner, torch.tensor([[3, 1, 4, 1]]), model.runner.bucket(0)
    worst = 0.0
    for start in (0, 4, 8):
        place = 0, ids, torch.tensor([start]), length
        worst = max(worst, float((runner.logits(*place) - runner.eager_logits(*place)).abs().max()))
    return f"yes, {took:.0f} s, {model.recompilations.count} later, off by {worst:.0e}"


if __name__ == "__main__":
    names = sys.argv[1:] or [*SERVED, GPT_OSS, LONG_ROPE]
    with TemporaryDirectory() as folder:
        for name, attention in product(names, ("sdpa", "eager")):
            torch._dynamo.reset()
            try:
                outcome = compile_family(save_family(name, Path(folder)), attention)
            except Exception as error:  # whatever the compiler cannot do is a finding
                outcome = f"no: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"{name:24} {attention:6} {outcome}", flush=True)
