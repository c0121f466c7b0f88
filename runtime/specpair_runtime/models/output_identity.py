"""What decides a model's output besides the request, as one digest: services with the same one say the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import torch
import transformers

from specpair_runtime.models.serving_model import ServingModel

__all__ = ["output_identity"]


def output_identity(model: ServingModel, width: int) -> str:
    """A SHA-256 in hex over the weights' digest, the vocabulary, `width` (rows per step), and the software and hardware
    that round their sums.
    """
    loaded, runner = model.loaded, model.runner
    device = runner.device
    parts = {
        "model": loaded.options.model,
        "weights": loaded.weights_sha256,
        "config": loaded.model.config.to_json_string(),
        "vocabulary": asdict(loaded.fingerprint),
        "dtype": loaded.options.dtype,
        "quantization": loaded.quantization,
        "attention": loaded.options.attn_implementation,
        "width": width,
        "max_length": runner.max_length,
        "device": _hardware(device),
        "compiled": runner.compiled,
        "lean": model.lean,
        "processes": model.processes,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hardware(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device)]
    # Products are split between threads, and summed in an order that vector units decide.
    return [device.type, torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())]
