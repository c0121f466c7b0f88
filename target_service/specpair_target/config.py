"""Configuration of the target service."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from specpair_runtime.models.config import ModelConfig

__all__ = ["TargetConfig"]

_WIDEST = 64
# Measured on a CPU with 12 M and 30 M parameters in bf16: 128 rows of prefill take twice as long as a step of four
# sessions, and 1.14 times as long per token as 256 rows; 64 rows 1.3 times and 1.43. A GPU computes hundreds of rows in
# the time of one.
_CHUNK_CPU, _CHUNK_ELSEWHERE = 128, 512


class TargetConfig(ModelConfig):
    """The target service: verifies proposals with the large model and tells the truth about its tokens."""

    model_config = SettingsConfigDict(env_prefix="SPECPAIR_TARGET_")

    model: str = Field(min_length=1, description="Directory or hub id of the target model.")
    listen: str = Field("127.0.0.1:50051", description="Address to serve on, HOST:PORT; port 0 takes a free one.")
    verify_width: int | Literal["auto"] = Field(
        8,
        description="Rows of every step: a block carries up to one proposal less than this. auto measures at the start "
        "what steps cost and takes what --expected-acceptance makes the most of.",
    )
    expected_acceptance: float = Field(
        0.7, gt=0, lt=1, description="Chance that a proposal is accepted, for --verify-width auto."
    )
    prefill_chunk: int = Field(
        0,
        ge=0,
        le=8192,
        description=f"Most prompt tokens in one forward pass; 0: {_CHUNK_CPU} on a CPU, {_CHUNK_ELSEWHERE} elsewhere.",
    )
    step_tokens: int = Field(
        0,
        ge=0,
        le=1_048_576,
        description="Rows of prefill and of the step beside it, while both wait; 0: a chunk and one session's.",
    )
    gather: bool = Field(
        True, description="Let a step wait for sessions that are about to send their next block, where that saves time."
    )

    @field_validator("verify_width", mode="before")
    @classmethod
    def _is_a_width(cls, value: object) -> object:
        if value == "auto":
            return value
        width = int(value) if isinstance(value, str) and value.isdecimal() else value
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= _WIDEST:
            raise ValueError(f"must be auto or a number from 1 to {_WIDEST}")
        return width

    def chunk_on(self, device_type: str) -> int:
        """Tokens of a prefill chunk on a device of type "cpu", "cuda", ..."""
        return self.prefill_chunk or (_CHUNK_CPU if device_type == "cpu" else _CHUNK_ELSEWHERE)
