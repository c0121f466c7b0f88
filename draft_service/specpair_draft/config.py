"""Configuration of the draft service."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from specpair_runtime.models.config import ModelConfig

__all__ = ["DraftConfig", "ProposerName"]

ProposerName = Literal["model", "ngram"]


class DraftConfig(ModelConfig):
    """The draft service: proposes tokens with a small model or by prompt lookup."""

    model_config = SettingsConfigDict(env_prefix="SPECPAIR_DRAFT_")

    listen: str = Field("127.0.0.1:50052", description="Address to serve on, HOST:PORT; port 0 takes a free one.")
    proposer: ProposerName = Field(
        "model", description="model proposes with --model, and by prompt lookup when asked; ngram needs no model."
    )
    run_ahead: bool = Field(
        True, description="Guess on with the model while nobody asks, as if all that was proposed had come true."
    )

    @model_validator(mode="after")
    def _model_is_named(self) -> Self:
        if self.proposer == "model" and not self.model:
            raise ValueError("model: is required with the proposer model; --proposer ngram needs none")
        if self.proposer == "ngram" and self.model:
            raise ValueError("model: is not used by the proposer ngram")
        return self
