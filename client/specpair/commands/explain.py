"""`specpair explain`."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

import typer

from specpair.client import SpeculativeClient
from specpair.commands.options import Json, Sampling, Target, Text, TextFile
from specpair.commands.progress import Wait, wait_for
from specpair.commands.texts import prompt_text
from specpair.connecting import Connecting
from specpair.errors import InvalidRequestError
from specpair.explaining import continuation_ids, parse_ids, texts_of
from specpair.naming import DEFAULT_TARGET
from specpair.rendering import explanation_object, explanation_table, stdout
from specpair.results import PositionExplanation

__all__ = ["explain"]


def explain(
    prompt: Text = None,
    prompt_file: TextFile = None,
    proposal_ids: Annotated[
        str | None, typer.Option(metavar="ID,ID,...", help="Token ids to judge.", show_default=False)
    ] = None,
    proposal: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text to judge; its tokens may be others than a model would propose for it."),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(metavar="HOST:PORT|ngram|none", help="Judge what this draft proposes.")
    ] = None,
    draft_length: Annotated[
        int | None, typer.Option(help="With --draft: tokens to propose.", show_default="as many as a block holds")
    ] = None,
    as_json: Json = False,
    target: Target = DEFAULT_TARGET,
    wait: Wait = None,
    *,
    sampling: Sampling,
    connecting: Connecting,
) -> None:
    """Show why the target would accept or reject each token of a proposal behind a text."""
    text = prompt_text(prompt, prompt_file)
    if [proposal_ids, proposal, draft].count(None) != 2:
        raise InvalidRequestError("give one of --proposal-ids, --proposal and --draft", field="proposal")
    given = parse_ids(proposal_ids, "proposal_ids") if proposal_ids is not None else None
    params = sampling.params

    async def ask() -> tuple[tuple[PositionExplanation, ...], dict[int, str]]:
        async with SpeculativeClient(
            target,
            draft or "none",
            draft_length=draft_length,
            credentials=connecting.target,
            draft_credentials=connecting.draft,
        ) as client:
            await wait_for(target, draft or "none", connecting, wait)
            ids = given if proposal is None else await continuation_ids(client, text, proposal)
            explained = await client.explain(text, ids, params)
            said = [one.target_token_id for one in explained]
            proposed = [one.proposed_token_id for one in explained if one.proposed_token_id is not None]
            return explained, await texts_of(client, [*said, *proposed])

    explained, texts = asyncio.run(ask())
    if as_json:
        print(json.dumps(explanation_object(explained, texts)))
    else:
        stdout.print(explanation_table(explained, texts))
