"""Configuration of the target service."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from specpair_runtime.models.config import ModelConfig

__all__ = ["TargetConfig"]


class TargetConfig(ModelConfig):
    """The target service: verifies proposals with the large model and tells the truth about its tokens."""

    model_config = SettingsConfigDict(env_prefix="SPECPAIR_TARGET_")

    model: str = Field(min_length=1, description="Directory or hub id of the target model.")
    listen: str = Field("127.0.0.1:50051", description="Address to serve on, HOST:PORT; port 0 takes a free one.")
    verify_width: int = Field(
        8, ge=1, le=64, description="Rows of every step: a block carries up to one proposal less than this."
    )
