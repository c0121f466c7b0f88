"""Loading a causal language model from a directory or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from specpair.errors import ModelLoadError
from specpair_runtime.models.attention import GROUPED, register_attention
from specpair_runtime.models.tokenizers import VocabularyFingerprint, fingerprint, load_tokenizer

__all__ = [
    "AttentionName",
    "DtypeName",
    "LoadOptions",
    "LoadedModel",
    "QuantizationName",
    "check_causal",
    "load_config",
    "load_model",
]

DtypeName = Literal["bf16", "fp16", "fp32"]
QuantizationName = Literal["none", "int8", "nf4", "fp4"]
AttentionName = Literal["sdpa", "eager"]

_DTYPES: dict[DtypeName, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ATTENTION: dict[AttentionName, str] = {"sdpa": GROUPED, "eager": "eager"}


@dataclass(frozen=True)
class LoadOptions:
    """What to load and how; each field is an option of the services by the same name."""

    model: str
    dtype: DtypeName = "bf16"
    quantization: QuantizationName = "none"
    device: str = "auto"
    attn_implementation: AttentionName = "sdpa"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with what is known about its vocabulary."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    fingerprint: VocabularyFingerprint
    options: LoadOptions

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for, None when its config does not say."""
        config = self.model.config.get_text_config(decoder=True)
        positions: int | None = getattr(config, "max_position_embeddings", None)
        return positions


def load_model(options: LoadOptions) -> LoadedModel:
    """Loads weights (safetensors only, no remote code) and tokenizer.

    Raises ModelLoadError whose field is the option at fault.
    """
    transformers_logging.disable_progress_bar()
    device = _device(options.device)
    register_attention()
    config = load_config(options.model)
    check_causal(config)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            options.model,
            config=config,
            dtype=_DTYPES[options.dtype],
            attn_implementation=_ATTENTION[options.attn_implementation],
            quantization_config=_quantization(options),
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelLoadError(f"cannot load {options.model!r}: {_first_line(error)}", field="model") from error
    except KeyError as error:
        raise ModelLoadError(
            f"{config.model_type} has no attention {options.attn_implementation!r}; try eager",
            field="attn_implementation",
        ) from error
    model.eval()
    tokenizer = load_tokenizer(options.model)
    return LoadedModel(model, tokenizer, fingerprint(model, tokenizer), options)


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
    if getattr(model_class, "_is_stateful", False) or layers - {"full_attention", "sliding_attention"}:
        raise ModelLoadError(
            f"{kind} keeps a recurrent state, which cannot be rolled back when proposals are rejected", field="model"
        )


def _check_directory(model: str) -> None:
    path = Path(model)
    # A hub id has at most one slash; everything else can only mean a directory.
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if looks_local and not path.is_dir():
        raise ModelLoadError(f"no such directory: {model}", field="model")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelLoadError(f"unknown device {name!r}", field="device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(f"{name!r} is not available: no CUDA device is visible", field="device")
    return device


def _quantization(options: LoadOptions) -> BitsAndBytesConfig | None:
    if options.quantization == "none":
        return None
    if options.quantization == "int8":
        # Without outlier decomposition: that picks its columns from all rows of a step together, so a token's logits
        # would depend on which proposals share its block (docs/determinism.md).
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quantization,
        bnb_4bit_compute_dtype=_DTYPES[options.dtype],
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
