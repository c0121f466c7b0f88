"""`specpair chat`."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated

import typer

from specpair.chat.conversation import Conversation
from specpair.chat.display import display_for
from specpair.chat.lines import LineReader
from specpair.chat.repl import Reader, Repl
from specpair.chat.slash import COMMANDS
from specpair.commands.options import Ending, Sampling, Services, Speculating, opened
from specpair.commands.progress import Wait, wait_for
from specpair.connecting import Connecting
from specpair.errors import InvalidRequestError
from specpair.messages import ModelInfo
from specpair.rendering import decorated, legend, stdout

__all__ = ["chat"]


def chat(
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Message that the conversation begins with.", show_default=False)
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain", help="Turns of plain text, for a model without a chat template: each goes on behind all."
        ),
    ] = False,
    history: Annotated[
        bool,
        typer.Option("--history/--no-history", help="Keep what is typed for the next chat, in a file of the user's."),
    ] = True,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Longest that an answer may take.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer.")] = False,
    wait: Wait = None,
    *,
    services: Services,
    sampling: Sampling,
    ending: Ending,
    speculating: Speculating,
    connecting: Connecting,
) -> None:
    """Talk with a model: several turns on one session, /help for what else can be typed.

    Where standard input or output is no terminal a line is a turn, and its answer is printed as it is.
    """
    if plain and system is not None:
        raise InvalidRequestError("plain turns have no system message", field="system")
    params = replace(sampling.params, **ending.params(512))

    async def run() -> None:
        async with opened(services, connecting, speculating) as client:
            await wait_for(services.target, services.draft, connecting, wait)
            target, draft = await client.info()
            if not plain and not target.chat:
                raise InvalidRequestError(
                    "the model has no chat template: with this option each turn is plain text behind all before",
                    field="plain",
                )
            conversation = Conversation(client, params, plain=plain, system=system, timeout=timeout)
            with _reader(history) as reader:
                if reader.interactive:
                    _greet(target, draft, services.draft)
                await Repl(client, conversation, reader, partial(display_for, as_json=as_json)).run()

    asyncio.run(run())


@contextlib.contextmanager
def _reader(history: bool) -> Iterator[Reader]:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield LineReader()
        return
    from specpair.chat import prompting  # nobody else waits for it to load

    with prompting.ctrl_d_as_a_key(sys.stdin.fileno()):
        yield prompting.PromptReader(prompting.history_file() if history else None, list(COMMANDS))


def _greet(target: ModelInfo, draft: ModelInfo | None, given: str) -> None:
    stdout.print(f"{target.model}, draft: {draft.model or given if draft else given}")
    if decorated(stdout):
        stdout.print(legend())
    stdout.print("/help shows what else can be typed, Ctrl-D ends.")
