"""`specpair bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specpair.bench import running, sweeps
from specpair.commands.options import Draft, Target
from specpair.connecting import Connecting
from specpair.errors import InvalidRequestError
from specpair.naming import DEFAULT_DRAFT, DEFAULT_TARGET

__all__ = ["bench"]

_List = "A,B,..."


def bench(
    target: Target = DEFAULT_TARGET,
    draft: Draft = DEFAULT_DRAFT,
    sweep: Annotated[str, typer.Option("--sweeps", metavar=_List, help="What to vary.", show_default="all")] = ",".join(
        sweeps.NAMES
    ),
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='JSON list of texts or of {"text": ...}.', show_default="built in"),
    ] = None,
    prompt_count: Annotated[int, typer.Option(min=1, help="How many of them.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens per generation.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of every case and prompt.")] = 3,
    sessions: Annotated[str, typer.Option(metavar=_List, help="Generations at a time.")] = "1,2,4,8,16",
    context: Annotated[str, typer.Option(metavar=_List, help="Tokens of the prompt.")] = "64,256,512,1024",
    temperature: Annotated[str, typer.Option(metavar=_List, help="Temperatures.")] = "0,0.5,0.8,1",
    delay: Annotated[
        str, typer.Option(metavar=_List, help="Milliseconds that a round trip to the services takes longer.")
    ] = "0,5,20,50",
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write bench.json and plots here.", show_default="nowhere")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    *,
    connecting: Connecting,
) -> None:
    """Measure running services: by draft length, proposer, sessions, context, temperature and delay, beside theory.

    Every case runs in turns with the others; tokens are checked. Nothing else should use the services meanwhile.
    """
    if draft in ("none", "ngram"):
        raise InvalidRequestError("bench compares a draft service with the others: give its address", field="draft")
    running.run(
        running.Options(
            target=target,
            draft=draft,
            sweeps=tuple(sweep.replace(",", " ").split()),
            prompts=prompts,
            prompt_count=prompt_count,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            sessions=_whole(sessions, "sessions"),
            contexts=_whole(context, "context"),
            temperatures=running.numbers(temperature, "temperature"),
            delays=running.numbers(delay, "delay"),
            output=output,
            as_json=as_json,
            credentials=connecting.target,
            draft_credentials=connecting.draft,
        )
    )


def _whole(text: str, field: str) -> tuple[int, ...]:
    found = running.numbers(text, field)
    if any(number < 1 or number != int(number) for number in found):
        raise InvalidRequestError(f"{text!r} must name whole numbers from 1 on", field=field)
    return tuple(map(int, found))
