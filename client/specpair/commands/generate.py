"""`specpair generate`."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Annotated

import typer

from specpair.commands.options import Ending, Json, Sampling, Services, Speculating, Text, TextFile, opened
from specpair.commands.progress import Wait, wait_for
from specpair.commands.texts import prompt_text, read_text
from specpair.connecting import Connecting
from specpair.rendering import StreamPrinter, decorated, result_object, stderr, stdout, summary

__all__ = ["generate"]


def generate(
    prompt: Text = None,
    prompt_file: TextFile = None,
    prediction_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text that the output is expected to be; - is standard input."),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --json: log probabilities, of the N best tokens too.", show_default=False),
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds to take at most.", show_default=False)] = None,
    as_json: Json = False,
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids in place of text.")] = False,
    wait: Wait = None,
    *,
    services: Services,
    sampling: Sampling,
    ending: Ending,
    speculating: Speculating,
    connecting: Connecting,
) -> None:
    """Continue a text: streamed, on a terminal coloured by who proposed each token."""
    text = prompt_text(prompt, prompt_file)
    prediction = None if prediction_file is None else read_text(prediction_file, "prediction_file")
    params = replace(sampling.params, **ending.params(128), logprobs=logprobs)

    async def run() -> None:
        async with opened(services, connecting, speculating) as client:
            await wait_for(services.target, services.draft, connecting, wait)
            async with client.stream(text, params, prediction=prediction, timeout=timeout) as stream:
                printer = StreamPrinter(stdout, ids=ids)
                async for chunk in stream:
                    if not as_json:
                        printer.show(chunk)
        if as_json:
            print(json.dumps(result_object(stream.result)))
            return
        printer.end()
        if decorated(stdout):
            stderr.print(summary(stream.result.stats), style="dim")

    asyncio.run(run())
