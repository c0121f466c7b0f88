"""What is said in a chat, and the session that holds it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from specpair.client import SpeculativeClient
from specpair.params import Prompt, SamplingParams
from specpair.prediction import without_prefix
from specpair.results import Result
from specpair.session import Session
from specpair.stream import TokenStream

__all__ = ["Conversation"]


class Conversation:
    """Turns on one session. What a turn committed stays said, also if it did not reach its end.

    A session ends with a turn that breaks off; the next turn then opens another one with everything said before.
    With `plain` there are no roles: what is said stands on lines of its own behind the text so far. `system` begins a
    conversation that has roles. Both attributes besides may be changed between turns: `params`, and `timeout`, the
    seconds that an answer may take.
    """

    def __init__(
        self,
        client: SpeculativeClient,
        params: SamplingParams,
        *,
        plain: bool = False,
        system: str | None = None,
        timeout: float | None = None,
    ) -> None:
        self.params = params
        self.timeout = timeout
        self.plain = plain
        self.last: Result | None = None
        """The last turn, if it reached its end."""
        self._client = client
        self._system = system
        self._session: Session | None = None
        self._said: list[tuple[str, str]] = []
        self._token_ids: tuple[int, ...] = ()

    @property
    def system(self) -> str | None:
        """What the conversation begins with."""
        return self._system

    @property
    def messages(self) -> list[dict[str, str]]:
        """Everything said, as messages."""
        said = [] if self._system is None else [{"role": "system", "content": self._system}]
        for text, answer in self._said:
            said += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return said

    @property
    def text(self) -> str:
        """Everything said, one after the other."""
        return "".join(part for turn in self._said for part in turn)

    async def instruct(self, system: str | None) -> None:
        """Changes the system message, as if it had been so from the start."""
        self._system = system
        await self.aclose()

    async def reset(self) -> None:
        """Forgets what was said; the system message stays."""
        self._said, self._token_ids, self.last = [], (), None
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the session, if there is one."""
        session, self._session = self._session, None
        if session is not None:
            await session.aclose()

    @contextlib.asynccontextmanager
    async def turn(self, text: str) -> AsyncIterator[TokenStream]:
        """The answer to a text. Leaving the block before its end is the end of the turn."""
        if self.plain:
            text = text if text.endswith("\n") else text + "\n"
            text = text if not self._said or self.text.endswith("\n") else "\n" + text
        prompt = await self._prompt(text)
        session = self._session = self._session or self._client.session()
        stream = session.stream(prompt, self.params, timeout=self.timeout)
        try:
            async with stream:
                yield stream
        finally:
            if tokens := stream.tokens:
                self._said.append((text, "".join(token.text for token in tokens)))
                self._token_ids = session.token_ids
            self.last = _result(stream)
            if self.last is None:
                await self.aclose()

    async def _prompt(self, text: str) -> Prompt:
        """What the session has not heard yet."""
        message = {"role": "user", "content": text}
        if self._session is not None:
            return text if self.plain else [message]
        if not self.plain:
            return [*self.messages, message]
        if not self._token_ids:
            return text
        added = await without_prefix(await self._client.tokenize(text), self._client.detokenize)
        return [*self._token_ids, *added]


def _result(stream: TokenStream) -> Result | None:
    try:
        return stream.result
    except RuntimeError:
        return None
