"""Configuration that every service with a model shares."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from specpair_runtime.models.options import (
    AttentionName,
    DeviceMapName,
    DtypeName,
    LoadOptions,
    QuantizationName,
    SdpaBackendName,
)
from specpair_runtime.models.runner import CompileModeName, CompileOptions
from specpair_runtime.serving import ServiceConfig

__all__ = ["CompileMode", "ModelConfig"]

CompileMode = Literal["auto", "on", "off"]


class ModelConfig(ServiceConfig):
    """Options for loading and running a model."""

    model: str = Field("", description="Directory or hub id of the model.")
    dtype: DtypeName = Field("bf16", description="Format of weights, activations and KV cache.")
    device: str = Field("auto", description="auto takes the first CUDA device, else the CPU; or cpu, cuda:1, ...")
    device_map: DeviceMapName = Field(
        "one", description="one: all layers on --device; auto: spread over the GPUs of this process by accelerate."
    )
    quantization: QuantizationName = Field(
        "none", description="Format of the linear layers' weights; int8, nf4 and fp4 need bitsandbytes, ..wo torchao."
    )
    quantization_compute_dtype: DtypeName | None = Field(
        None, description="Format that 4-bit weights are multiplied in; default: --dtype."
    )
    double_quantization: bool = Field(False, description="Quantize the scales of 4-bit weights too.")
    attn_implementation: AttentionName = Field("sdpa", description="How attention is computed.")
    sdpa_backend: SdpaBackendName = Field("auto", description="Kernel of sdpa; auto leaves the choice to torch.")
    slots: int = Field(4, ge=1, le=256, description="Sessions at a time; each has a KV cache slot of its own.")
    max_length: int = Field(
        2048, ge=2, le=1_048_576, description="KV cache positions per slot; cut to what the model was made for."
    )
    queue: int = Field(64, ge=0, le=100_000, description="Sessions that may wait for a slot.")
    queue_timeout: float = Field(30.0, ge=0, description="Seconds that a session waits for a slot at most.")
    sessions_per_client: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Sessions that one client may have at a time, those that wait included; 0: no limit.",
    )
    prefill_chunk: int = Field(256, ge=1, le=8192, description="Most prompt tokens in one forward pass.")
    lean: bool = Field(
        True, description="Prepare the weights for steps of few rows; off: the model's own layers as they are."
    )
    deterministic: bool = Field(
        False, description="Run every step over all slots, for hardware whose results depend on the batch size."
    )
    compile: CompileMode = Field(
        "auto", description="torch.compile of the steps; auto compiles on CUDA and not on a CPU."
    )
    compile_mode: CompileModeName | None = Field(
        None, description="Mode of torch.compile; default: reduce-overhead on CUDA, default on a CPU."
    )
    compile_freezing: bool = Field(
        False, description="On a CPU: pack weights into the graphs. Faster steps; every start compiles again."
    )
    fullgraph: bool = Field(True, description="Refuse to compile a step in more than one graph.")
    compile_cache: str = Field(
        "auto", description="Directory for what was compiled; auto is one of the user's, off keeps and uses nothing."
    )

    def compile_options(self, device_type: str) -> CompileOptions | None:
        """How to compile on a device of type "cpu", "cuda", ...; None not to."""
        cuda = device_type == "cuda"
        if self.compile == "off" or (self.compile == "auto" and not cuda):
            return None
        mode = self.compile_mode or ("reduce-overhead" if cuda else "default")
        return CompileOptions(mode, self.fullgraph, self.compile_freezing and device_type == "cpu")

    @property
    def load_options(self) -> LoadOptions:
        """What the loader needs to know."""
        return LoadOptions(
            model=self.model,
            dtype=self.dtype,
            quantization=self.quantization,
            quantization_compute_dtype=self.quantization_compute_dtype,
            double_quantization=self.double_quantization,
            device=self.device,
            device_map=self.device_map,
            attn_implementation=self.attn_implementation,
            sdpa_backend=self.sdpa_backend,
        )
