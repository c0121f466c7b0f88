"""`specpair plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from specpair import memory
from specpair.commands.options import Json
from specpair.rendering import plan_summary, plan_table, status, stdout

__all__ = ["plan"]


def plan(
    model: Annotated[str, typer.Argument(help="Directory or hub id; only its configuration is read.")],
    max_length: Annotated[
        int | None, typer.Option(min=1, help="KV cache positions per slot.", show_default="2048")
    ] = None,
    gpu: Annotated[
        list[str] | None, typer.Option(metavar="SIZE", help="Memory to fit in, as 24GB or 80GiB; may be repeated.")
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share the model, each on a GPU of its own.", show_default="1"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a model takes of memory in each format, and how many KV slots fit beside it on given GPUs."""
    with status("computing"):
        found = memory.plan(model, max_length=max_length, memory=gpu or (), parallel=parallel)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    stdout.print(plan_summary(found))
    stdout.print(plan_table(found))
