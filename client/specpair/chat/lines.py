"""Standard input that is no terminal: a line is a turn."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from typing import TextIO

from specpair.errors import InvalidRequestError

__all__ = ["LineReader"]


class LineReader:
    """Reads lines without holding up the event loop, and without being waited for at the end of the process."""

    interactive = False

    def __init__(self, source: TextIO | None = None) -> None:
        self._source = source or sys.stdin
        self._lines: asyncio.Queue[str | InvalidRequestError | None] = asyncio.Queue()
        self._thread: threading.Thread | None = None

    async def read(self) -> str | None:
        """The next line without its end; None behind the last. Raises InvalidRequestError for what is not UTF-8."""
        if self._thread is None:
            loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._follow, args=(loop,), daemon=True)
            self._thread.start()
        line = await self._lines.get()
        if isinstance(line, InvalidRequestError):
            raise line
        return line

    def _follow(self, loop: asyncio.AbstractEventLoop) -> None:
        def pass_on(line: str | InvalidRequestError | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(self._lines.put_nowait, line)

        try:
            for line in self._source:
                pass_on(line.removesuffix("\n"))
        except UnicodeDecodeError:
            pass_on(InvalidRequestError("is not UTF-8 text", field="stdin"))
        pass_on(None)
