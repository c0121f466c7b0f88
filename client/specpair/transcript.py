"""What was said in a session, for a target that has not heard it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from specpair.errors import InvalidRequestError
from specpair.messages import Start
from specpair.params import ChatMessage, Prompt
from specpair.transports import TargetTransport
from specpair.turn import Turn

__all__ = ["Transcript", "is_chat"]


@dataclass(frozen=True, slots=True)
class Transcript:
    """A session up to the beginning of a turn."""

    token_ids: tuple[int, ...] = ()
    messages: tuple[ChatMessage, ...] = ()
    """The same as a conversation, the answers included; empty if it is none, because a turn was text or token ids."""

    def after(self, turn: Turn) -> Transcript:
        """The session up to the end of that turn."""
        if turn.loop is None:
            return self
        messages = self._with(turn.prompt)
        if messages:
            answer = "".join(token.text for token in turn.loop.tokens)
            messages = (*messages, {"role": "assistant", "content": answer})
        return Transcript(tuple(turn.loop.token_ids), messages)

    async def start(self, turn: Turn, target: TargetTransport, within: float | None) -> Start:
        """The turn as the beginning of a session that includes everything before it.

        Raises InvalidRequestError, as the target does, for messages behind what is no conversation.
        """
        if not self.token_ids:
            return Start(turn.prompt, turn.params, request=turn.request)
        if is_chat(turn.prompt):
            if not self.messages:
                raise InvalidRequestError("the session does not hold a conversation", field="extend.prompt.chat")
            return Start(self._with(turn.prompt), turn.params, request=turn.request)
        added = turn.prompt
        if isinstance(added, str):
            added = await target.tokenize(added, within, continuation=True)
        return Start((*self.token_ids, *cast("Sequence[int]", added)), turn.params, request=turn.request)

    def again(self, turn: Turn, *, chat: bool) -> Start:
        """The turn behind the tokens that it has committed so far: as a conversation if `chat` and it is one, else as
        token ids."""
        assert turn.loop is not None, "the turn has begun"
        ids, prompt_length = turn.loop.token_ids, turn.loop.prompt_length
        messages = self._with(turn.prompt) if chat else ()
        return Start(
            messages or tuple(ids[:prompt_length]), turn.params, tuple(ids[prompt_length:]), request=turn.request
        )

    def _with(self, prompt: Prompt) -> tuple[ChatMessage, ...]:
        """The messages, with those of a prompt behind them; none if either is no conversation."""
        if not is_chat(prompt) or (self.token_ids and not self.messages):
            return ()
        return (*self.messages, *(dict(message) for message in prompt if isinstance(message, Mapping)))


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a conversation."""
    return not isinstance(prompt, str) and any(isinstance(part, Mapping) for part in prompt)
