"""`specpair demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specpair import demo as demonstration
from specpair.commands.options import Json

__all__ = ["demo"]


def demo(
    models: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Directory with target/, draft/ and prompts.json.", show_default="models/demo"
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per generation.")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Timed generations per prompt and side.")] = 3,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to time.")] = 5,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32.", show_default="bf16, the draft fp32")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads per service.", show_default="half of the cores")
    ] = None,
    as_json: Json = False,
) -> None:
    """Start a draft and a target service, watch them work together, and compare with the target alone."""
    demonstration.run(
        demonstration.Options(
            models=models,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            prompts=prompts,
            dtype=dtype,
            threads=threads,
            as_json=as_json,
        )
    )
