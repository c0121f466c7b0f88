"""The commands of `specpair`: options in, client calls, output. Each has a module."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

import specpair
from specpair.commands.bench import bench
from specpair.commands.chat import chat
from specpair.commands.declaring import declared
from specpair.commands.demo import demo
from specpair.commands.explain import explain
from specpair.commands.generate import generate
from specpair.commands.plan import plan
from specpair.commands.services import health, info
from specpair.rendering import decorated, stdout
from specpair.visible import visible

__all__ = ["app"]

# Help in boxes cuts names where a terminal is narrow.
_BOXES = decorated(stdout) and stdout.width >= 120

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if _BOXES else None,
    help="Speculative decoding with a draft and a target service. Exit codes: 0 done, 1 failed, 2 wrong usage or "
    "request, 3 service unreachable or full, 4 out of time, 130 interrupted.",
    epilog="A flag goes before its environment variable, which goes before the configuration file.",
)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    handler = _Warnings()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.addLevelName(logging.WARNING, "warning")
    if version:
        print(specpair.__version__)
        raise typer.Exit


class _Warnings(logging.Handler):
    """Writes to what stderr is at the time: above a line that is redrawn in place, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        print(visible(self.format(record)), file=sys.stderr)


for _command in (generate, chat, explain, info, health, plan, bench, demo):
    app.command()(declared(_command))
