"""Prompts into token ids: of a session's first turn, and of a later one behind what is there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from specpair.errors import InvalidRequestError
from specpair_runtime.wire import check_token_ids
from specpair_target.sessions import ChatMessage, Session

__all__ = ["Prompt", "Prompts"]

# What is too long to be tokenized at all: no text has so many characters a token on average, and tokenizing megabytes
# takes seconds.
_CHARACTERS_PER_POSITION = 32
_LEAST_CHARACTERS = 65_536
_MAX_MESSAGES = 4096
_MAX_ROLE = 64


@dataclass(frozen=True)
class Prompt:
    """All tokens that a turn begins with, and the conversation that they render, if it is one."""

    token_ids: list[int]
    messages: list[ChatMessage] = field(default_factory=list)


@dataclass(frozen=True)
class Prompts:
    """Makes prompts with a model's tokenizer. `field` is the path by which InvalidRequestError names what is wrong."""

    tokenizer: PreTrainedTokenizerBase | None
    max_length: int
    vocabulary: int

    def of_text(self, text: str, field: str, after: Session | None = None, *, continuation: bool = False) -> Prompt:
        """Text as the tokenizer takes it by default; behind an earlier turn, and as one that would be (`continuation`),
        without special tokens of its own."""
        tokenizer = self._tokenizer(field)
        self._check_size(len(text), field)
        if after is None:
            ids = tokenizer(text, add_special_tokens=not continuation)["input_ids"]
            return self._checked(Prompt(list(ids)), field)
        added = tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.of_ids(added, field, after)

    def of_ids(self, token_ids: Sequence[int], field: str, after: Session | None = None) -> Prompt:
        """Token ids, behind those of an earlier turn if there is one."""
        if not token_ids:
            raise InvalidRequestError("must not be empty", field=field)
        return self._checked(Prompt([*(after.tokens if after is not None else ()), *token_ids]), field)

    def of_chat(
        self, messages: Sequence[ChatMessage], opening: bool, field: str, after: Session | None = None
    ) -> Prompt:
        """A conversation through the chat template; behind an earlier turn, that conversation with its answer first.

        The whole conversation is rendered again, so that a later turn's tokens are those of a fresh session.
        """
        tokenizer = self._tokenizer(field)
        if not tokenizer.chat_template:
            raise InvalidRequestError("this model has no chat template", field=field)
        if not messages:
            raise InvalidRequestError("must not be empty", field=f"{field}.messages")
        self._check_messages(messages, f"{field}.messages")
        if after is not None:
            if not after.messages:
                raise InvalidRequestError("the session does not hold a conversation", field=field)
            messages = [*after.messages, {"role": "assistant", "content": after.answer}, *messages]
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opening)
        except Exception as error:  # templates raise what they like, for roles out of order for example
            raise InvalidRequestError(f"the chat template refuses it: {error}", field=f"{field}.messages") from error
        # The template writes the special tokens itself.
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._checked(Prompt(ids, list(messages)), field)

    def _check_messages(self, messages: Sequence[ChatMessage], field: str) -> None:
        if len(messages) > _MAX_MESSAGES:
            raise InvalidRequestError(f"at most {_MAX_MESSAGES} messages", field=field)
        for index, message in enumerate(messages):
            if len(message["role"]) > _MAX_ROLE:
                raise InvalidRequestError(f"at most {_MAX_ROLE} characters", field=f"{field}[{index}].role")
        self._check_size(sum(len(message["content"]) for message in messages), field)

    def _check_size(self, characters: int, field: str) -> None:
        most = max(_CHARACTERS_PER_POSITION * self.max_length, _LEAST_CHARACTERS)
        if characters > most:
            raise InvalidRequestError(f"more than {most} characters", field=field)

    def _tokenizer(self, field: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer; send token ids", field=field)
        return self.tokenizer

    def _checked(self, prompt: Prompt, field: str) -> Prompt:
        if not prompt.token_ids:
            raise InvalidRequestError("must not be empty", field=field)
        if len(prompt.token_ids) > self.max_length:
            raise InvalidRequestError(
                f"{len(prompt.token_ids)} tokens are more than the {self.max_length} positions of a slot", field=field
            )
        # A tokenizer may know tokens that were added behind the embedding matrix.
        check_token_ids(prompt.token_ids, self.vocabulary, field)
        return prompt
