"""Configuration that every service with a model shares."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from specpair_runtime.models.loading import AttentionName, DtypeName, LoadOptions, QuantizationName
from specpair_runtime.serving import ServiceConfig

__all__ = ["CompileMode", "ModelConfig"]

CompileMode = Literal["auto", "on", "off"]


class ModelConfig(ServiceConfig):
    """Options for loading and running a model."""

    model: str = Field("", description="Directory or hub id of the model.")
    dtype: DtypeName = Field("bf16", description="Format of weights, activations and KV cache.")
    device: str = Field("auto", description="auto takes the first CUDA device, else the CPU; or cpu, cuda:1, ...")
    quantization: QuantizationName = Field("none", description="bitsandbytes quantization of the weights.")
    attn_implementation: AttentionName = Field("sdpa", description="How attention is computed.")
    slots: int = Field(4, ge=1, le=256, description="Sessions at a time; each has a KV cache slot of its own.")
    max_length: int = Field(
        2048, ge=2, le=1_048_576, description="KV cache positions per slot; cut to what the model was made for."
    )
    queue: int = Field(64, ge=0, le=100_000, description="Sessions that may wait for a slot.")
    queue_timeout: float = Field(30.0, ge=0, description="Seconds that a session waits for a slot at most.")
    prefill_chunk: int = Field(256, ge=1, le=8192, description="Most prompt tokens in one forward pass.")
    compile: CompileMode = Field(
        "auto", description="torch.compile with fullgraph; auto compiles on CUDA and not on a CPU."
    )

    @property
    def load_options(self) -> LoadOptions:
        """What the loader needs to know."""
        return LoadOptions(
            model=self.model,
            dtype=self.dtype,
            quantization=self.quantization,
            device=self.device,
            attn_implementation=self.attn_implementation,
        )
