"""What a model can be loaded with, and whether this machine can do it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from specpair.errors import ModelLoadError
from specpair_runtime.models.quantize import INT4_GROUP

__all__ = [
    "DTYPES",
    "AttentionName",
    "DeviceMapName",
    "DtypeName",
    "LoadOptions",
    "QuantizationName",
    "SdpaBackendName",
    "check_available",
    "quantization_config",
    "resolve_device",
]

DtypeName = Literal["bf16", "fp16", "fp32"]
QuantizationName = Literal["none", "int8", "nf4", "fp4", "int8wo", "int4wo", "int8dyn"]
AttentionName = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]
DeviceMapName = Literal["one", "auto"]
SdpaBackendName = Literal["auto", "math", "flash", "efficient", "cudnn"]

DTYPES: dict[DtypeName, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# By the package that has them; int8dyn needs none.
_BITSANDBYTES = ("int8", "nf4", "fp4")
_TORCHAO = ("int8wo", "int4wo")


@dataclass(frozen=True)
class LoadOptions:
    """What to load and how; each field is an option of the services by the same name."""

    model: str
    dtype: DtypeName = "bf16"
    quantization: QuantizationName = "none"
    quantization_compute_dtype: DtypeName | None = None
    double_quantization: bool = False
    device: str = "auto"
    device_map: DeviceMapName = "one"
    attn_implementation: AttentionName = "sdpa"
    sdpa_backend: SdpaBackendName = "auto"


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is the first CUDA device, else the CPU. Raises ModelLoadError naming `device`."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelLoadError(f"unknown device {name!r}", field="device") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelLoadError(f"{name!r} is not supported; cpu, cuda or cuda:N are", field="device")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(f"{name!r} is not available: no CUDA device is visible", field="device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelLoadError(f"{name!r} is not available: {torch.cuda.device_count()} are visible", field="device")
    return device


def check_available(options: LoadOptions, device: torch.device) -> None:
    """Raises ModelLoadError naming an option that this machine, or the other options, cannot go with."""
    if options.device_map == "auto" and options.device != "auto":
        raise ModelLoadError(f"{options.device!r} is one device; --device-map auto takes all", field="device")
    if options.attn_implementation == "flash_attention_2":
        _check_flash(options, device)
    if options.sdpa_backend != "auto" and options.attn_implementation != "sdpa":
        raise ModelLoadError(
            f"chooses among kernels of sdpa, not of {options.attn_implementation}", field="sdpa_backend"
        )
    if options.sdpa_backend in ("efficient", "cudnn") and device.type != "cuda":
        raise ModelLoadError(f"{options.sdpa_backend} needs a CUDA device", field="sdpa_backend")
    _check_quantization(options, device)
    four_bit = options.quantization in ("nf4", "fp4")
    if options.double_quantization and not four_bit:
        raise ModelLoadError("is for nf4 and fp4", field="double_quantization")
    if options.quantization_compute_dtype is not None and not four_bit:
        raise ModelLoadError("is for nf4 and fp4", field="quantization_compute_dtype")


def _check_quantization(options: LoadOptions, device: torch.device) -> None:
    name = options.quantization
    for package, names in (("bitsandbytes", _BITSANDBYTES), ("torchao", _TORCHAO)):
        if name in names and find_spec(package) is None:
            raise ModelLoadError(f"{name} needs the package {package}", field="quantization")
    # In other formats torch's kernels for few rows are slower than restored weights by orders of magnitude.
    few_rows_only_bf16 = name in _TORCHAO and (device.type == "cpu" or name == "int4wo")
    if few_rows_only_bf16 and options.dtype != "bf16":
        raise ModelLoadError(f"{name} needs bf16, not {options.dtype}", field="quantization")
    if name == "int8dyn" and device.type != "cpu":
        raise ModelLoadError("int8dyn runs on a CPU only", field="quantization")
    if name == "int8dyn" and not torch._C._has_mkldnn:
        raise ModelLoadError("int8dyn needs a build of torch with oneDNN", field="quantization")


def _check_flash(options: LoadOptions, device: torch.device) -> None:
    if device.type != "cuda":
        raise ModelLoadError("flash_attention_2 needs a CUDA device", field="attn_implementation")
    if find_spec("flash_attn") is None:
        raise ModelLoadError("flash_attention_2 needs the package flash-attn", field="attn_implementation")
    if options.dtype == "fp32":
        raise ModelLoadError("flash_attention_2 needs bf16 or fp16", field="attn_implementation")


def quantization_config(options: LoadOptions, device: torch.device) -> BitsAndBytesConfig | TorchAoConfig | None:
    """What transformers quantizes by while it loads; None if it does not.

    On a CPU int8wo, int4wo and int8dyn are made of the loaded model (`quantize`).
    """
    if options.quantization == "none" or (device.type == "cpu" and options.quantization not in _BITSANDBYTES):
        return None
    if options.quantization in _TORCHAO:
        return _torchao_config(options)
    if options.quantization == "int8":
        # Without outlier decomposition: that picks its columns from all rows of a step together, so a token's logits
        # would depend on which proposals share its block (docs/determinism.md).
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quantization,
        bnb_4bit_compute_dtype=DTYPES[options.quantization_compute_dtype or options.dtype],
        bnb_4bit_use_double_quant=options.double_quantization,
    )


def _torchao_config(options: LoadOptions) -> TorchAoConfig:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    # torchao would set options of torch.compile for the whole process.
    if options.quantization == "int8wo":
        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    return TorchAoConfig(
        Int4WeightOnlyConfig(group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    )
