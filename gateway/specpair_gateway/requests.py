"""What callers may ask for, field by field, and the generations that it stands for.

Types are checked here, ranges at the target, which alone knows them. A field that this server does not know, or does
not carry out, is an error unless it says what is so anyway: no output is other than was asked for in silence.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from specpair import InvalidRequestError, Prompt, SamplingParams, UnsupportedError
from specpair_gateway.generations import Job

__all__ = ["ChatRequest", "CompletionRequest", "GenerationRequest", "StreamOptions"]

# Of a token id in decimal.
_MOST_DIGITS = 10
# Change nothing of the output.
_IGNORED = frozenset(
    [
        *("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
        *("service_tier", "store", "user"),
    ]
)
# Fields that would change it, with the values that say what is so anyway; null always does.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
_NEUTRAL_IN_MESSAGES = frozenset(["refusal", "annotations"])
# The noise takes seeds of 64 bits; JSON numbers are exact everywhere up to 53.
_SEEDS = 2**64
_DRAWN_BITS = 53


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _prompts(given: object) -> object:
    """Text, token ids, or several of either, as a list of prompts."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise ValueError("must be text, token ids, or a list of either")
    if all(isinstance(part, str) for part in given) or all(_are_ids(part) for part in given):
        return given
    if _are_ids(given):
        return [given]
    raise ValueError("must be text, token ids, or a list of either")


def _are_ids(part: object) -> bool:
    return isinstance(part, list) and bool(part) and all(type(one) is int for one in part)


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_listed)] = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # As in vLLM's server.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    @property
    def names(self) -> dict[str, str]:
        """What this request calls its prompt, its longest output and its log probabilities."""
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """How many there are to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with statistics."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def jobs(self, most: int) -> tuple[Job, ...]:
        """The generations, all choices of the first prompt first.

        Choice i of a prompt is what a request with the seed plus i says to it. Without a seed one is drawn.
        Raises InvalidRequestError naming the field for what cannot be, and for more than `most` of them.
        """
        self._check_extra()
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("is allowed in a stream only", field="stream_options")
        prompts = self._read_prompts()
        if self.choices < 1:
            raise InvalidRequestError("must be at least 1", field="n")
        if len(prompts) * self.choices > most:
            field = "n" if self.choices > 1 else self.names["prompt"]
            raise InvalidRequestError(f"at most {most} choices in one request", field=field)
        seed = secrets.randbits(_DRAWN_BITS) if self.seed is None else self.seed
        prediction = self._read_prediction()
        return tuple(
            Job(prompt, self._sampling((seed + choice) % _SEEDS), prediction)
            for prompt in prompts
            for choice in range(self.choices)
        )

    def _read_prompts(self) -> Sequence[Prompt]:
        raise NotImplementedError

    def _read_prediction(self) -> str | None:
        return None

    def _longest(self) -> int | None:
        raise NotImplementedError

    def _logprobs(self) -> int | None:
        raise NotImplementedError

    def _sampling(self, seed: int) -> SamplingParams:
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=None if self.top_k == -1 else self.top_k,  # vLLM's way to say all
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self._biases(),
            seed=seed,
            max_new_tokens=self._longest(),
            min_new_tokens=self.min_tokens,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=self._logprobs(),
        )

    def _biases(self) -> dict[int, float] | None:
        biases = self.logit_bias or {}
        for token_id in biases:
            if not (token_id.isascii() and token_id.isdecimal() and len(token_id) <= _MOST_DIGITS):
                raise InvalidRequestError("must be a token id", field=f"logit_bias.{token_id[:32]}")
        return {int(token_id): bias for token_id, bias in biases.items()} or None

    def _check_extra(self) -> None:
        for name, value in (self.model_extra or {}).items():
            if name in _IGNORED or value is None or any(value == neutral for neutral in _NEUTRAL.get(name, ())):
                continue
            raise UnsupportedError("is not supported", field=name, reason="UNSUPPORTED_PARAMETER")


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
    logprobs: int | None = None

    @property
    def names(self) -> dict[str, str]:
        return {"prompt": "prompt", "max_tokens": "max_tokens", "logprobs": "logprobs"}

    def _read_prompts(self) -> Sequence[Prompt]:
        return self.prompt

    def _longest(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # as OpenAI does

    def _logprobs(self) -> int | None:
        return self.logprobs


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    prediction: dict[str, Any] | None = None

    @property
    def names(self) -> dict[str, str]:
        longest = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {"prompt": "messages", "max_tokens": longest, "logprobs": "top_logprobs"}

    def _read_prompts(self) -> Sequence[Prompt]:
        if not self.messages:
            raise InvalidRequestError("must not be empty", field="messages")
        return [[_message(message, f"messages[{index}]") for index, message in enumerate(self.messages)]]

    def _read_prediction(self) -> str | None:
        if self.prediction is None:
            return None
        if self.prediction.get("type") != "content":
            raise InvalidRequestError('must be "content"', field="prediction.type")
        return _text(self.prediction.get("content"), "prediction.content")

    def _longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def _logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs is not None:
            raise InvalidRequestError("needs logprobs", field="top_logprobs")
        return None


def _message(given: Mapping[str, Any], path: str) -> dict[str, str]:
    """A message as chat templates know it."""
    for name, value in given.items():
        if name not in {"role", "content", *_NEUTRAL_IN_MESSAGES} and value is not None and value != []:
            raise UnsupportedError("is not supported", field=f"{path}.{name}", reason="UNSUPPORTED_PARAMETER")
    role = given.get("role")
    if not isinstance(role, str):
        raise InvalidRequestError("must be text", field=f"{path}.role")
    # The newer name of the same thing, which templates do not know.
    return {
        "role": "system" if role == "developer" else role,
        "content": _text(given.get("content"), f"{path}.content"),
    }


def _text(given: object, path: str) -> str:
    """Text, or the text of parts, which stand behind each other as they are."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise InvalidRequestError("must be text or a list of text parts", field=path)
    texts = []
    for index, part in enumerate(given):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise UnsupportedError(
                "only parts of the type text are supported", field=f"{path}[{index}]", reason="UNSUPPORTED_PARAMETER"
            )
        if not isinstance(text := part.get("text"), str):
            raise InvalidRequestError("must be text", field=f"{path}[{index}].text")
        texts.append(text)
    return "".join(texts)
