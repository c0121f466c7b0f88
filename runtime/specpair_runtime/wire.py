"""Conversion between the protocol's messages and the runtime's types, with validation of what both services read."""

from __future__ import annotations

import math
from collections.abc import Iterable

from specpair.errors import InvalidRequestError, UnsupportedError
from specpair.v1 import common_pb2
from specpair_runtime.models.serving_model import ServingModel
from specpair_runtime.sampling.params import SamplingParams

__all__ = ["check_token_ids", "describe_model", "read_sampling"]

_MAX_TEMPERATURE = 100.0


def read_sampling(message: common_pb2.SamplingParams, field: str) -> SamplingParams:
    """Checked sampling parameters. Raises InvalidRequestError that names the field below the path `field`."""
    if message.rule == common_pb2.ACCEPTANCE_RULE_REJECTION:
        raise UnsupportedError("the rejection rule is not available; use the coupled rule", field=f"{field}.rule")
    _refuse_unavailable(message, field)
    temperature = message.temperature if message.HasField("temperature") else 0.0
    if not (math.isfinite(temperature) and 0.0 <= temperature <= _MAX_TEMPERATURE):
        raise InvalidRequestError(
            f"must be between 0 and {_MAX_TEMPERATURE:g}, not {temperature:g}", field=f"{field}.temperature"
        )
    top_p = message.top_p if message.HasField("top_p") else 1.0
    if not 0.0 < top_p <= 1.0:
        raise InvalidRequestError(f"must be above 0 and at most 1, not {top_p:g}", field=f"{field}.top_p")
    return SamplingParams(temperature=temperature, top_k=message.top_k, top_p=top_p, seed=_signed(message.seed))


def _refuse_unavailable(message: common_pb2.SamplingParams, field: str) -> None:
    asked = {
        "min_p": message.min_p != 0.0,
        "repetition_penalty": message.HasField("repetition_penalty") and message.repetition_penalty != 1.0,
        "presence_penalty": message.presence_penalty != 0.0,
        "frequency_penalty": message.frequency_penalty != 0.0,
        "logit_bias": bool(message.logit_bias),
        "min_new_tokens": message.min_new_tokens > 0,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise UnsupportedError("not available", field=f"{field}.{name}")


def check_token_ids(ids: Iterable[int], vocabulary: int, field: str) -> None:
    """Raises InvalidRequestError naming the first id at or above the vocabulary's size."""
    for index, id_ in enumerate(ids):
        if id_ >= vocabulary:
            raise InvalidRequestError(
                f"token id {id_} is outside the vocabulary of {vocabulary}", field=f"{field}[{index}]"
            )


def describe_model(info: common_pb2.ModelInfo, model: ServingModel) -> None:
    """Writes what a loaded model is into a ModelInfo."""
    loaded, runner = model.loaded, model.runner
    fingerprint = loaded.fingerprint
    info.fingerprint.CopyFrom(
        common_pb2.Fingerprint(
            vocabulary_size=fingerprint.vocabulary_size,
            vocabulary_sha256=fingerprint.vocabulary_sha256,
            special_tokens_sha256=fingerprint.special_tokens_sha256,
            eos_token_ids=fingerprint.eos_token_ids,
            chat_template_sha256=fingerprint.chat_template_sha256,
        )
    )
    info.architecture = type(loaded.model).__name__
    info.parameters = loaded.model.num_parameters()
    info.device = str(runner.device)
    info.attn_implementation = loaded.options.attn_implementation
    info.compiled = runner.compiled
    info.max_length = runner.max_length
    info.recompilations = model.recompilations.count
    info.chat = bool(fingerprint.chat_template_sha256)


def _signed(seed: int) -> int:
    """The same 64 bits as a signed integer, as tensors hold them."""
    return seed - 2**64 if seed >= 2**63 else seed
