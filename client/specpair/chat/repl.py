"""The loop of a chat: read, answer, read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol

from rich.table import Table

from specpair.chat.conversation import Conversation
from specpair.chat.display import Display
from specpair.chat.slash import COMMANDS, changed, described, parsed
from specpair.client import SpeculativeClient
from specpair.errors import InvalidRequestError, SpecpairError
from specpair.explaining import texts_of
from specpair.rendering import explanation_table, stderr, stdout
from specpair.results import FinishReason

__all__ = ["Reader", "Repl"]


class Reader(Protocol):
    """Where lines come from."""

    interactive: bool
    """Whether somebody types them: then there are commands, and errors do not end the chat."""

    async def read(self) -> str | None:
        """The next turn; None behind the last."""


class Repl:
    """A chat. Ctrl-C ends an answer when somebody is there to go on, else everything."""

    def __init__(
        self, client: SpeculativeClient, conversation: Conversation, reader: Reader, display: Callable[[], Display]
    ) -> None:
        self._client = client
        self._conversation = conversation
        self._reader = reader
        self._display = display
        self._commands: dict[str, Callable[[str], Awaitable[None]]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/params": self._params,
            "/explain": self._explain,
            "/save": self._save,
        }

    async def run(self) -> None:
        """Until there is nothing more to read. Raises what an answer raises, unless somebody is there."""
        try:
            while (line := await self._reader.read()) is not None:
                if not self._reader.interactive:
                    await self._answer(line)
                elif not await self._respond(line):
                    break
        finally:
            await self._conversation.aclose()

    async def _respond(self, line: str) -> bool:
        """Does what somebody typed; whether the chat goes on."""
        try:
            command = parsed(line)
            if command is not None:
                name, argument = command
                if name == "/quit":
                    return False
                await _interruptible(self._commands[name](argument))
            elif line.strip() and not await _interruptible(self._answer(_spoken(line))):
                stderr.print("stopped; what was said stays", style="dim")
        except SpecpairError as error:
            stderr.print(f"error: {error}")
        return True

    async def _answer(self, text: str) -> None:
        if not text:
            raise InvalidRequestError("must not be empty", field="turn")
        with self._display() as display:
            async with self._conversation.turn(text) as stream:
                async for chunk in stream:
                    display.show(chunk, stream.stats)
            display.end(stream.result)
        if stream.result.finish_reason is FinishReason.CACHE_FULL:
            stderr.print("the slot is full: only /reset makes room for more", style="dim")

    async def _help(self, argument: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, (usage, text) in COMMANDS.items():
            table.add_row(f"{name} {usage}", text)
        stdout.print(table)
        stdout.print("Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer.")

    async def _reset(self, argument: str) -> None:
        await self._conversation.reset()

    async def _system(self, argument: str) -> None:
        if not argument:
            stdout.print(self._conversation.system or "no system message")
        elif self._conversation.plain:
            raise InvalidRequestError("plain turns have no system message", field="/system")
        else:
            await self._conversation.instruct(argument)

    async def _params(self, argument: str) -> None:
        self._conversation.params = changed(self._conversation.params, argument)
        stdout.print(described(self._conversation.params))

    async def _explain(self, argument: str) -> None:
        if (last := self._conversation.last) is None:
            raise InvalidRequestError("there is no finished answer yet", field="/explain")
        explained = await self._client.explain(last.prompt_token_ids, None, self._conversation.params)
        ids = {one.target_token_id for one in explained} | {one.proposed_token_id for one in explained}
        texts = await texts_of(self._client, (id_ for id_ in ids if id_ is not None))
        stdout.print(explanation_table(explained, texts))

    async def _save(self, argument: str) -> None:
        conversation = self._conversation
        if not argument:
            raise InvalidRequestError("give a FILE", field="/save")
        said = conversation.text if conversation.plain else json.dumps(conversation.messages, indent=2) + "\n"
        await asyncio.to_thread(_write, argument, said)


def _spoken(line: str) -> str:
    """What is said with a line that is no command: a second slash in front says one."""
    return line[1:] if line.startswith("//") else line


def _write(file: str, said: str) -> None:
    try:
        Path(file).expanduser().write_text(said, encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:  # besides what a disk says: no such user, no such name or text
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequestError(f"cannot write {file}: {reason}", field="/save") from None


async def _interruptible(work: Awaitable[None]) -> bool:
    """Whether work reached its end before Ctrl-C. Raises what it raises."""
    task = asyncio.ensure_future(work)
    with _on_interrupt(task.cancel):
        try:
            await task
        except asyncio.CancelledError:
            if (own := asyncio.current_task()) is not None and own.cancelling():
                raise
            return False
    return True


@contextlib.contextmanager
def _on_interrupt(act: Callable[[], object]) -> Iterator[None]:
    """Has Ctrl-C do that, and nothing else."""
    loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGINT)
    loop.add_signal_handler(signal.SIGINT, act)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)
