"""What decides a model's output besides the request, as one digest: services with the same one say the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from contextlib import suppress
from dataclasses import asdict

import torch
import transformers

from specpair_runtime.models.compile_cache import machine_key
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.serving_model import ServingModel

__all__ = ["output_identity"]


def output_identity(model: ServingModel, config: ModelConfig, *, width: int, chunk: int) -> str:
    """A SHA-256 in hex over the weights' digest, the vocabulary, the shapes of what is computed (`width` rows of a
    step, `chunk` tokens of a prefill), and the software and hardware that round their sums.

    `config` is what the model was loaded with.
    """
    loaded, runner = model.loaded, model.runner
    device = runner.device
    compile_ = config.compile_options(device.type) if runner.compiled else None
    parts = {
        "model": loaded.options.model,
        "weights": loaded.weights_sha256,
        "config": loaded.model.config.to_json_string(),
        "vocabulary": asdict(loaded.fingerprint),
        "dtype": loaded.options.dtype,
        "quantization": loaded.quantization,
        "attention": [loaded.options.attn_implementation, config.sdpa_backend],
        "width": width,
        "chunk": chunk,
        "max_length": runner.max_length,
        # The widest step that weights were packed for, and the last of the lengths that rows attend over.
        "scratch": runner.scratch,
        # Otherwise a step's sessions are any number, which does not matter.
        "batch": runner.slots if config.deterministic else None,
        "device": _hardware(device),
        "compiled": asdict(compile_) if compile_ is not None else None,
        "lean": model.lean,
        "processes": model.processes,
        "software": _software(loaded.quantization != "none"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _software(quantized: bool) -> dict[str, str]:
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("specpair", "bitsandbytes", "torchao") if quantized else ("specpair",):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _hardware(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device)]
    # Products are split between threads, and summed in an order that the processor's instructions decide: of two that
    # have AVX-512 one may have more for bf16.
    return [device.type, machine_key(), str(torch.get_num_threads())]
