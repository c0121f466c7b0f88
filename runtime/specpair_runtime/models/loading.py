"""Loading a causal language model from a directory or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from specpair.errors import ModelLoadError
from specpair_runtime.models.attention import register_attention, registered_name
from specpair_runtime.models.options import (
    DTYPES,
    LoadOptions,
    check_available,
    quantization_config,
    resolve_device,
)
from specpair_runtime.models.parallel import check_splittable, distributed_config, rank_device
from specpair_runtime.models.quantize import quantize_linears
from specpair_runtime.models.ranks import Ranks
from specpair_runtime.models.tokenizers import VocabularyFingerprint, fingerprint, load_tokenizer
from specpair_runtime.models.weights_digest import weights_digest

__all__ = ["LoadOptions", "LoadedModel", "check_causal", "check_length", "check_split", "load_config", "load_model"]

_SERVED_LAYERS = {"full_attention", "sliding_attention"}
_RECURRENT_LAYERS = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with what is known about its vocabulary."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    fingerprint: VocabularyFingerprint
    options: LoadOptions
    parameters: int
    """Those of the checkpoint, whatever they are packed into."""
    weights_sha256: str
    """A digest that changes with the weights, as they were loaded."""

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for, None when its config does not say."""
        config = self.model.config.get_text_config(decoder=True)
        positions: int | None = getattr(config, "max_position_embeddings", None)
        return positions

    @property
    def whole(self) -> bool:
        """Whether all of it is on one device in one process."""
        spread = set(getattr(self.model, "hf_device_map", {}).values())
        return len(spread) <= 1 and not self.model.is_distributed_loading_by_transformers

    @property
    def quantization(self) -> str:
        """As configured, or the method of a checkpoint that brings its own."""
        own = getattr(self.model.config, "quantization_config", None)
        if self.options.quantization != "none" or own is None:
            return self.options.quantization
        return _method(own)


def load_model(options: LoadOptions, ranks: Ranks | None = None) -> LoadedModel:
    """Loads weights (safetensors only, no remote code) and tokenizer.

    A checkpoint that was quantized before it was saved is loaded as transformers does. `ranks`, which have come
    together, load a part of the weights each. Raises ModelLoadError whose field is the option at fault.
    """
    transformers_logging.disable_progress_bar()
    device = resolve_device(options.device) if ranks is None else rank_device(options, ranks)
    check_available(options, device)
    register_attention()
    config = load_config(options.model)
    check_causal(config)
    own = getattr(config, "quantization_config", None)
    if own is not None and options.quantization != "none":
        raise ModelLoadError(f"the checkpoint is quantized already: {_method(own)}", field="quantization")
    quantization = quantization_config(options, device)
    try:
        model: PreTrainedModel
        model, report = AutoModelForCausalLM.from_pretrained(
            options.model,
            config=config,
            dtype=DTYPES[options.dtype],
            attn_implementation=registered_name(options.attn_implementation),
            quantization_config=quantization,
            **_placement(options, config, device, ranks),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(f"cannot load {options.model!r}: {_first_line(error)}", field="model") from error
    except KeyError as error:
        raise ModelLoadError(
            f"{config.model_type} has no attention {options.attn_implementation!r}; try eager",
            field="attn_implementation",
        ) from error
    if absent := sorted(report["missing_keys"]):
        # transformers fills them with random numbers.
        raise ModelLoadError(f"the checkpoint lacks {len(absent)} tensors, {absent[0]} for one", field="model")
    _check_resident(model)
    parameters, weights = model.num_parameters(), weights_digest(model)
    if options.quantization != "none" and quantization is None:
        quantize_linears(model, options.quantization)
    model.eval()
    tokenizer = load_tokenizer(options.model)
    return LoadedModel(model, tokenizer, fingerprint(model, tokenizer), options, parameters, weights)


def check_split(options: LoadOptions, ranks: Ranks) -> None:
    """Raises ModelLoadError for a model that these processes cannot share, before they come together."""
    config = load_config(options.model)
    check_causal(config)
    check_splittable(config, options, ranks.size)
    check_available(options, rank_device(options, ranks))


def load_config(model: str) -> PreTrainedConfig:
    """The config of a directory or hub id. Raises ModelLoadError naming `model`."""
    _check_directory(model)
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"no model config in {model!r}: {_first_line(error)}", field="model") from error


def check_causal(config: PreTrainedConfig) -> None:
    """Raises ModelLoadError for a family that cannot be verified in blocks, before its weights are loaded."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ModelLoadError(f"{kind} is an encoder-decoder model, not a causal one", field="model")
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    layers = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    # A recurrent state cannot be rolled back to an earlier position, as a KV cache can.
    if getattr(model_class, "_is_stateful", False) or layers & _RECURRENT_LAYERS:
        raise ModelLoadError(
            f"{kind} keeps a recurrent state, which cannot be rolled back when proposals are rejected", field="model"
        )
    if unknown := sorted(layers - _SERVED_LAYERS):
        raise ModelLoadError(f"{kind} has layers that have no slot cache: {', '.join(unknown)}", field="model")


def check_length(config: PreTrainedConfig, max_length: int) -> None:
    """Raises ModelLoadError for more positions than the model has one set of rotary frequencies for.

    LongRoPE turns all positions of a forward pass differently as soon as one of them is beyond the length of the first
    training: a token's keys would depend on which sessions and how much padding share its step.
    """
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    # A family may have parameters for each type of layer.
    for rope in (parameters, *parameters.values()):
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            most = rope["original_max_position_embeddings"]
            if max_length > most:
                raise ModelLoadError(
                    f"{config.model_type} has other rotary frequencies beyond {most} positions; at most {most}",
                    field="max_length",
                )


def _placement(
    options: LoadOptions, config: PreTrainedConfig, device: torch.device, ranks: Ranks | None
) -> dict[str, Any]:
    """Where transformers is to put the weights."""
    if ranks is not None:
        return {"distributed_config": distributed_config(config, ranks.size)}
    if options.device_map == "auto":
        return {"device_map": "auto"}
    return {"device_map": {"": device}}


def _check_resident(model: PreTrainedModel) -> None:
    """Refuses a model of which accelerate would fetch parts for every step, from memory or from disk."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ModelLoadError(f"it does not fit: parts would be on {', '.join(sorted(places))}", field="device_map")


def _check_directory(model: str) -> None:
    path = Path(model)
    # A hub id has at most one slash; everything else can only mean a directory.
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if looks_local and not path.is_dir():
        raise ModelLoadError(f"no such directory: {model}", field="model")


def _method(own: object) -> str:
    """The name of a checkpoint's own quantization, whose config is a dict before the model is built."""
    method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", None)
    return str(getattr(method, "value", method))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
