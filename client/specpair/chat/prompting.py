"""Input from a terminal: several lines, history, completion of commands."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.patch_stdout import patch_stdout

from specpair.rendering import PLAIN, stderr

__all__ = ["PromptReader", "ctrl_d_as_a_key", "history_file"]


class PromptReader:
    """Reads what is typed. Enter sends; Alt-Enter begins a new line; pasted lines stay together."""

    interactive = True

    def __init__(self, history: Path | None, commands: Sequence[str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            "> ",
            history=_kept(history),
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_bindings(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=Condition(self._is_command),
            color_depth=ColorDepth.DEPTH_1_BIT if PLAIN else None,
        )

    async def read(self) -> str | None:
        """What is sent next; None after Ctrl-D, "" after Ctrl-C."""
        try:
            with patch_stdout():  # warnings come above what is being typed
                return await self._session.prompt_async()
        except EOFError:
            return None
        except KeyboardInterrupt:
            stderr.print("Ctrl-D or /quit ends the chat", style="dim")
            return ""

    def _is_command(self) -> bool:
        return self._session.default_buffer.text.startswith("/")


@contextlib.contextmanager
def ctrl_d_as_a_key(terminal: int) -> Iterator[None]:
    """Has Ctrl-D that is typed into an answer wait for the prompt, as all else that is typed then.

    Between prompts the terminal collects lines, and would take it for an end of file that nobody reads. The terminal
    is left as it was, by SIGTERM too.
    """
    before = termios.tcgetattr(terminal)
    changed = termios.tcgetattr(terminal)
    changed[6][termios.VEOF] = os.fpathconf(terminal, "PC_VDISABLE").to_bytes()

    def restore() -> None:
        with contextlib.suppress(termios.error):  # it is gone
            termios.tcsetattr(terminal, termios.TCSANOW, before)

    def end(number: int, frame: FrameType | None) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    handler = signal.signal(signal.SIGTERM, end)
    termios.tcsetattr(terminal, termios.TCSANOW, changed)
    try:
        yield
    finally:
        restore()
        signal.signal(signal.SIGTERM, handler)


def history_file() -> Path:
    """Where inputs are kept for the next chat."""
    return user_state_path("specpair") / "chat_history"


def _kept(path: Path | None) -> History:
    """A file that nobody else can read; none if it cannot be had."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        stderr.print(f"no history: {path}: {error.strerror}", style="dim")
        return InMemoryHistory()
    return FileHistory(str(path))


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    @bindings.add("c-j")  # Enter, typed before the prompt was there
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("escape", "c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
