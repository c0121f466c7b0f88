"""What a model needs, from its config alone: `python -m specpair_runtime.plan MODEL` prints one JSON object.

The model is built on the meta device, where tensors have shapes and no memory, and runs one token over a slot cache of
shapes, so that every family's own layout of weights and KV cache is counted. No weights are read.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from specpair.errors import InvalidRequestError, SpecpairError
from specpair_runtime.models.loading import check_causal, load_config
from specpair_runtime.models.options import LoadOptions
from specpair_runtime.models.parallel import check_splittable
from specpair_runtime.models.slot_cache import SlotCache

__all__ = ["Format", "Plan", "estimate", "main"]

# Bytes per element of what is kept in the compute dtype, and of the weights of linear layers.
_FORMATS: dict[str, tuple[float, float]] = {
    "fp32": (4, 4),
    "bf16": (2, 2),
    "int8": (2, 1),
    # One fp32 scale for every 64 weights.
    "nf4": (2, 0.5 + 4 / 64),
    "fp4": (2, 0.5 + 4 / 64),
}
# Those that can be split over processes.
_SPLITTABLE = ("fp32", "bf16")
# Projections into the heads of keys, fused with others or not.
_INTO_KEYS = ("k_proj", "qkv_proj", "query_key_value")
# bitsandbytes keeps one fp32 scale per output row.
_INT8_ROW_SCALE = 4


@dataclass(frozen=True)
class Format:
    """Bytes that a model takes in one format: weights, and one KV slot of `max_length` positions."""

    name: str
    weights: int
    slot: int


@dataclass(frozen=True)
class Plan:
    """What a model takes. `fits` says for each memory size in bytes how many slots fit beside the weights.

    Where `parallel` processes share the model, formats and sizes are those of one process and its device.
    """

    model: str
    architecture: str
    parameters: int
    max_length: int
    formats: tuple[Format, ...]
    fits: dict[int, dict[str, int]]
    parallel: int = 1


def estimate(
    model: str, *, max_length: int = 2048, memory: Sequence[int] = (), reserve: float = 0.1, parallel: int = 1
) -> Plan:
    """Estimates for a directory or hub id. Raises ModelLoadError, and InvalidRequestError for numbers below 1.

    `memory` are sizes of devices in bytes, of which `reserve` is left to activations and the framework.
    """
    if max_length < 1:
        raise InvalidRequestError("must be at least 1", field="max_length")
    if parallel < 1:
        raise InvalidRequestError("must be at least 1", field="parallel")
    config = load_config(model)
    check_causal(config)
    if parallel > 1:
        check_splittable(config, LoadOptions(model), parallel)
    with torch.device("meta"):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linear, rows, other = _count_weights(network)
    held = _held(network, parallel)
    positions = min(max_length, getattr(config.get_text_config(decoder=True), "max_position_embeddings", max_length))
    elements = _slot_elements(network, config, positions) // (parallel if _splits_heads(network) else 1)
    formats = tuple(
        Format(
            name,
            weights=round(held * per_other)
            if parallel > 1
            else round(linear * per_weight + other * per_other + (rows * _INT8_ROW_SCALE if name == "int8" else 0)),
            slot=round(elements * per_other),
        )
        for name, (per_other, per_weight) in _FORMATS.items()
        if parallel == 1 or name in _SPLITTABLE
    )
    return Plan(
        model=model,
        architecture=type(network).__name__,
        parameters=network.num_parameters(),
        max_length=positions,
        formats=formats,
        fits={size: {kind.name: _slots(size * (1 - reserve), kind) for kind in formats} for size in memory},
        parallel=parallel,
    )


def _slots(usable: float, kind: Format) -> int:
    return max(0, int((usable - kind.weights) // kind.slot))


def _count_weights(model: PreTrainedModel) -> tuple[int, int, int]:
    """Elements in linear layers that bitsandbytes quantizes, output rows of those, elements elsewhere."""
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    linear = sum(module.weight.numel() for module in linears)
    rows = sum(module.out_features for module in linears)
    everything = sum(parameter.numel() for parameter in model.parameters())  # tied weights count once
    everything += sum(buffer.numel() for buffer in model.buffers())
    return linear, rows, everything - linear


def _held(model: PreTrainedModel, parallel: int) -> int:
    """Elements of weights that the fullest of several processes holds, as transformers' plan splits them."""
    plan: dict[str, str] = model.tp_plan
    held: int = sum(buffer.numel() for buffer in model.buffers())
    for name, parameter in model.named_parameters():  # tied weights come once
        held += _share(parameter, plan.get(re.sub(r"\d+", "*", name.rpartition(".")[0]), ""), parallel)
    return held


def _splits_heads(model: PreTrainedModel) -> bool:
    """Whether each of several processes has the KV of its own heads."""
    plan: dict[str, str] = model.tp_plan or {}
    return any(name.endswith(_INTO_KEYS) and "colwise" in style for name, style in plan.items())


def _share(parameter: torch.Tensor, style: str, parallel: int) -> int:
    """Elements of one process: those split by rows keep their bias whole."""
    split = "colwise" in style or ("rowwise" in style and parameter.dim() > 1)
    return -(-parameter.numel() // parallel) if split else parameter.numel()


def _slot_elements(model: PreTrainedModel, config: PreTrainedConfig, positions: int) -> int:
    """Elements of keys and values of one slot over all layers."""
    device = torch.device("meta")
    cache = SlotCache(config, 1, positions, device)
    cache.view.positions = torch.zeros((1, 1), dtype=torch.int64, device=device)
    mask = torch.zeros((1, 1, 1, positions), dtype=model.dtype, device=device)
    layer_types = getattr(config.get_text_config(decoder=True), "layer_types", None)
    model(
        input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device),
        attention_mask=dict.fromkeys(layer_types, mask) if layer_types else mask,
        position_ids=cache.view.positions,
        past_key_values=cache,
        use_cache=True,
    )
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def _bytes(text: str) -> int:
    """A memory size: 24GB, 80GiB, or bytes."""
    for suffix, factor in {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "": 1}.items():
        if suffix and not text.endswith(suffix):
            continue
        try:
            size = float(text.removesuffix(suffix)) * factor
        except ValueError:
            break
        if 0 < size < 2**63:
            return round(size)
        break
    raise InvalidRequestError(f"{text!r} is not a size like 24GB or 80GiB", field="gpu")


def main() -> None:
    """Prints the plan, or one line with what is wrong; exit status 2 then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("--max-length", type=int, default=2048, help="KV cache positions per slot")
    parser.add_argument("--gpu", action="append", default=[], metavar="SIZE", help="memory to fit in, e.g. 24GB")
    parser.add_argument("--parallel", type=int, default=1, help="processes that share the model")
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    try:
        memory = [_bytes(size) for size in given.gpu]
        plan = estimate(given.model, max_length=given.max_length, memory=memory, parallel=given.parallel)
    except SpecpairError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(asdict(plan)))


if __name__ == "__main__":
    main()
