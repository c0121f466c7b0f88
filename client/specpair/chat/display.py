"""Answers as they come."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from specpair.rendering import STYLES, StreamPrinter, console, decorated, result_object, stdout, tally
from specpair.results import Chunk, Result, Stats
from specpair.visible import visible

__all__ = ["Display", "JsonAnswer", "LiveAnswer", "PlainAnswer", "display_for"]


class Display(Protocol):
    """Shows one answer."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, chunk: Chunk, stats: Stats) -> None:
        """Some more of it, and how it goes."""

    def end(self, result: Result) -> None:
        """All of it."""


class PlainAnswer:
    """The text, and nothing that a terminal would interpret."""

    def __init__(self) -> None:
        self._printer = StreamPrinter(stdout)
        self._begun = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._begun:
            self._printer.end()

    def show(self, chunk: Chunk, stats: Stats) -> None:
        self._begun = True
        self._printer.show(chunk)

    def end(self, result: Result) -> None:
        """It is there already."""


class JsonAnswer:
    """One JSON object on a line, at the end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, chunk: Chunk, stats: Stats) -> None:
        """Not yet."""

    def end(self, result: Result) -> None:
        print(json.dumps(result_object(result)), flush=True)


class LiveAnswer:
    """Coloured by who proposed each token. Below the line that is being written stands how it goes."""

    def __init__(self, where: Console | None = None) -> None:
        self._console = where or console(soft_wrap=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._line = Text()
        self._tally = Text()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._line:
            self._console.print(self._line, soft_wrap=True)
        if self._tally:
            self._console.print(self._tally)

    def show(self, chunk: Chunk, stats: Stats) -> None:
        for token in chunk.tokens:
            *finished, rest = visible(token.text).split("\n")
            for text in finished:
                self._line.append(text, STYLES[token.source])
                self._console.print(self._line, soft_wrap=True)
                self._line = Text()
            self._line.append(rest, STYLES[token.source])
        self._tally = tally(stats)
        self._live.update(Group(self._line, self._tally), refresh=True)

    def end(self, result: Result) -> None:
        self._tally = tally(result.stats)


def display_for(*, as_json: bool) -> Display:
    """The display that is meant where stdout leads to."""
    if as_json:
        return JsonAnswer()
    return LiveAnswer() if decorated(stdout) else PlainAnswer()
