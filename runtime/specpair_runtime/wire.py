"""Conversion between the protocol's messages and the runtime's types, with validation of what both services read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from specpair.errors import InvalidRequestError, UnsupportedError
from specpair.v1 import common_pb2
from specpair_runtime.models.serving_model import ServingModel
from specpair_runtime.sampling.params import SamplingParams

__all__ = ["check_token_ids", "describe_model", "read_sampling"]

_MAX_TEMPERATURE = 100.0
_MIN_TEMPERATURE = 1e-3
_MAX_REPETITION_PENALTY = 100.0
_MAX_BIAS = 1000.0
_MAX_BIASES = 1024


def read_sampling(message: common_pb2.SamplingParams, vocabulary: int | None, field: str) -> SamplingParams:
    """Checked sampling parameters. Raises InvalidRequestError that names the field below the path `field`.

    `vocabulary` None takes any id in `logit_bias`.
    """
    read = _Numbers(message, field)
    if message.rule not in (
        common_pb2.ACCEPTANCE_RULE_UNSPECIFIED,
        common_pb2.ACCEPTANCE_RULE_COUPLED,
        common_pb2.ACCEPTANCE_RULE_REJECTION,
    ):
        raise UnsupportedError(f"there is no rule {message.rule}", field=f"{field}.rule")
    return SamplingParams(
        temperature=_read_temperature(read),
        top_k=message.top_k,
        top_p=read.above("top_p", 0.0, 1.0, default=1.0),
        min_p=read.between("min_p", 0.0, 1.0, default=0.0),
        seed=_signed(message.seed),
        rejection=message.rule == common_pb2.ACCEPTANCE_RULE_REJECTION,
        repetition_penalty=read.between(
            "repetition_penalty", 1 / _MAX_REPETITION_PENALTY, _MAX_REPETITION_PENALTY, default=1.0
        ),
        presence_penalty=read.between("presence_penalty", -2.0, 2.0, default=0.0),
        frequency_penalty=read.between("frequency_penalty", -2.0, 2.0, default=0.0),
        logit_bias=_read_bias(message, vocabulary, f"{field}.logit_bias"),
        min_new_tokens=message.min_new_tokens,
    )


def _read_temperature(read: _Numbers) -> float:
    temperature = read.between("temperature", 0.0, _MAX_TEMPERATURE, default=0.0)
    if 0.0 < temperature < _MIN_TEMPERATURE:
        # Logits divided by less would overflow.
        read.between("temperature", _MIN_TEMPERATURE, _MAX_TEMPERATURE, default=0.0)
    return temperature


def _read_bias(message: common_pb2.SamplingParams, vocabulary: int | None, field: str) -> tuple[tuple[int, float], ...]:
    if len(message.logit_bias) > _MAX_BIASES:
        raise InvalidRequestError(f"at most {_MAX_BIASES} ids", field=field)
    for token_id, value in message.logit_bias.items():
        if vocabulary is not None and token_id >= vocabulary:
            raise InvalidRequestError(f"is outside the vocabulary of {vocabulary}", field=f"{field}[{token_id}]")
        if not abs(value) <= _MAX_BIAS:
            raise InvalidRequestError(
                f"must be between -{_MAX_BIAS:g} and {_MAX_BIAS:g}, not {value:g}", field=f"{field}[{token_id}]"
            )
    return tuple(sorted(message.logit_bias.items()))


_Float = Literal["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]


@dataclass(frozen=True)
class _Numbers:
    """Reads the optional floats of a message within bounds; NaN is within none."""

    message: common_pb2.SamplingParams
    field: str

    def between(self, name: _Float, least: float, most: float, *, default: float) -> float:
        """A number in [least, most]."""
        value: float = getattr(self.message, name) if self.message.HasField(name) else default
        if not _as_sent(least) <= value <= _as_sent(most):
            self._refuse(name, value, f"between {least:g} and {most:g}")
        return value

    def above(self, name: _Float, least: float, most: float, *, default: float) -> float:
        """A number in (least, most]."""
        value: float = getattr(self.message, name) if self.message.HasField(name) else default
        if not least < value <= most:
            self._refuse(name, value, f"above {least:g} and at most {most:g}")
        return value

    def _refuse(self, name: str, value: float, bounds: str) -> NoReturn:
        raise InvalidRequestError(f"must be {bounds}, not {value:g}", field=f"{self.field}.{name}")


def _as_sent(number: float) -> float:
    """A number as a float field carries it, in single precision."""
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return float(rounded)


def check_token_ids(ids: Sequence[int], vocabulary: int, field: str) -> None:
    """Raises InvalidRequestError naming the first id at or above the vocabulary's size."""
    if max(ids, default=0) < vocabulary:
        return
    for index, id_ in enumerate(ids):
        if id_ >= vocabulary:
            # Without the id itself: clients log why a draft was lost.
            raise InvalidRequestError(f"is outside the vocabulary of {vocabulary}", field=f"{field}[{index}]")


def describe_model(info: common_pb2.ModelInfo, model: ServingModel) -> None:
    """Writes what a loaded model is into a ModelInfo."""
    loaded, runner = model.loaded, model.runner
    info.fingerprint.CopyFrom(fingerprint_message(model))
    info.architecture = type(loaded.model).__name__
    info.parameters = loaded.parameters
    info.device = str(runner.device)
    info.quantization = loaded.quantization
    info.attn_implementation = loaded.options.attn_implementation
    info.compiled = runner.compiled
    info.max_length = runner.max_length
    info.recompilations = model.recompilations.count
    info.chat = bool(loaded.fingerprint.chat_template_sha256)
    info.parallel = model.processes


def fingerprint_message(model: ServingModel) -> common_pb2.Fingerprint:
    """What the ids of a loaded model mean."""
    fingerprint = model.loaded.fingerprint
    return common_pb2.Fingerprint(
        vocabulary_size=fingerprint.vocabulary_size,
        vocabulary_sha256=fingerprint.vocabulary_sha256,
        special_tokens_sha256=fingerprint.special_tokens_sha256,
        eos_token_ids=fingerprint.eos_token_ids,
        chat_template_sha256=fingerprint.chat_template_sha256,
    )


def _signed(seed: int) -> int:
    """The same 64 bits as a signed integer, as tensors hold them."""
    return seed - 2**64 if seed >= 2**63 else seed
