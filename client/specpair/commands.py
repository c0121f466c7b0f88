"""The commands of `specpair`: arguments in, client calls, output."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import specpair
from specpair import demo as demonstration
from specpair import memory
from specpair.bench.command import bench
from specpair.client import DEFAULT_DRAFT, DEFAULT_TARGET, SpeculativeClient
from specpair.connecting import Connecting, connects
from specpair.errors import InvalidRequestError, SpecpairError
from specpair.explaining import continuation_ids, parse_ids, texts_of
from specpair.grpc_transports import GrpcTarget
from specpair.messages import ModelInfo
from specpair.params import AcceptanceRule, SamplingParams
from specpair.rendering import (
    StreamPrinter,
    explanation_object,
    explanation_table,
    info_table,
    plan_summary,
    plan_table,
    result_object,
    stderr,
    stdout,
    summary,
)
from specpair.results import PositionExplanation

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Speculative decoding with a draft and a target service. Exit codes: 0 done, 1 failed, 2 wrong usage or "
    "request, 3 service unreachable or full, 4 out of time.",
)

_Target = Annotated[
    str, typer.Option(metavar="HOST:PORT[,...]", help="Address of the target service, or of several that run the same.")
]
_Draft = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT|ngram|none|auto[:HOST:PORT]",
        help="Who proposes: a draft service, prompt lookup, nobody, or a draft service if its vocabulary fits.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Text = Annotated[str | None, typer.Argument(help="Text to continue.", show_default=False)]
_File = Annotated[str | None, typer.Option(metavar="FILE", help="Take the text from a file; - is standard input.")]
_DraftLength = Annotated[
    int | None, typer.Option(help="Tokens to propose per round; default: what is fastest.", show_default=False)
]
_Lookup = Annotated[
    bool | None,
    typer.Option(
        "--lookup/--no-lookup",
        help="Let prompt lookup propose beside the draft's model where that is faster; default: yes, but not with "
        "--draft-length or the rejection rule.",
        show_default=False,
    ),
]
_PredictionFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Text that the output is expected to be; - is standard input."),
]
_Temperature = Annotated[float | None, typer.Option(help="0, the default, is greedy.", show_default=False)]
_TopK = Annotated[int | None, typer.Option(help="Keep the k most probable tokens.", show_default=False)]
_TopP = Annotated[float | None, typer.Option(help="Keep this much probability.", show_default=False)]
_MinP = Annotated[
    float | None, typer.Option(help="Keep tokens at least so probable, relative to the best.", show_default=False)
]
_Repetition = Annotated[
    float | None, typer.Option(help="Above 1: make tokens of prompt and output less likely.", show_default=False)
]
_Presence = Annotated[float | None, typer.Option(help="Taken from the score of generated tokens.", show_default=False)]
_Frequency = Annotated[
    float | None, typer.Option(help="The same, once for each time that a token was generated.", show_default=False)
]
_Bias = Annotated[
    list[str] | None, typer.Option(metavar="ID=VALUE", help="Added to the score of a token; may be repeated.")
]
_Seed = Annotated[int | None, typer.Option(help="Seed of the noise.", show_default=False)]
_Rule = Annotated[
    AcceptanceRule | None, typer.Option(help="How proposals are judged; default: coupled.", show_default=False)
]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.addLevelName(logging.WARNING, "warning")
    if version:
        print(specpair.__version__)
        raise typer.Exit


@app.command()
@connects
def generate(
    prompt: _Text = None,
    prompt_file: _File = None,
    target: _Target = DEFAULT_TARGET,
    draft: _Draft = DEFAULT_DRAFT,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    min_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens before the sequence may end.", show_default=False)
    ] = None,
    temperature: _Temperature = None,
    top_k: _TopK = None,
    top_p: _TopP = None,
    min_p: _MinP = None,
    repetition_penalty: _Repetition = None,
    presence_penalty: _Presence = None,
    frequency_penalty: _Frequency = None,
    logit_bias: _Bias = None,
    seed: _Seed = None,
    rule: _Rule = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be repeated.")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="Stop at this token; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind the end of the sequence.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --json: log probabilities, of the N best tokens too.", show_default=False),
    ] = None,
    draft_length: _DraftLength = None,
    lookup: _Lookup = None,
    prediction_file: _PredictionFile = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds to take at most.", show_default=False)] = None,
    as_json: _Json = False,
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids in place of text.")] = False,
    *,
    connecting: Connecting,
) -> None:
    """Continue a text: streamed, on a terminal coloured by who proposed each token."""
    text = _prompt(prompt, prompt_file)
    prediction = None if prediction_file is None else _read(prediction_file, "prediction_file")
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=_biases(logit_bias),
        seed=seed,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        rule=rule,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )

    async def run() -> None:
        async with (
            SpeculativeClient(
                target,
                draft,
                draft_length=draft_length,
                lookup=lookup,
                credentials=connecting.target,
                draft_credentials=connecting.draft,
            ) as client,
            client.stream(text, params, prediction=prediction, timeout=timeout) as stream,
        ):
            printer = StreamPrinter(stdout, ids=ids)
            async for chunk in stream:
                if not as_json:
                    printer.show(chunk)
        if as_json:
            print(json.dumps(result_object(stream.result)))
            return
        printer.end()
        if stdout.is_terminal:
            stderr.print(summary(stream.result.stats), style="dim")

    asyncio.run(run())


@app.command()
@connects
def explain(
    prompt: _Text = None,
    prompt_file: _File = None,
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
    target: _Target = DEFAULT_TARGET,
    temperature: _Temperature = None,
    top_k: _TopK = None,
    top_p: _TopP = None,
    min_p: _MinP = None,
    repetition_penalty: _Repetition = None,
    presence_penalty: _Presence = None,
    frequency_penalty: _Frequency = None,
    logit_bias: _Bias = None,
    seed: _Seed = None,
    rule: _Rule = None,
    draft_length: Annotated[
        int | None, typer.Option(help="With --draft: tokens to propose.", show_default="as many as a block holds")
    ] = None,
    as_json: _Json = False,
    *,
    connecting: Connecting,
) -> None:
    """Show why the target would accept or reject each token of a proposal behind a text."""
    text = _prompt(prompt, prompt_file)
    if [proposal_ids, proposal, draft].count(None) != 2:
        raise InvalidRequestError("give one of --proposal-ids, --proposal and --draft", field="proposal")
    given = parse_ids(proposal_ids, "proposal_ids") if proposal_ids is not None else None
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=_biases(logit_bias),
        seed=seed,
        rule=rule,
    )

    async def ask() -> tuple[tuple[PositionExplanation, ...], dict[int, str]]:
        async with SpeculativeClient(
            target,
            draft or "none",
            draft_length=draft_length,
            credentials=connecting.target,
            draft_credentials=connecting.draft,
        ) as client:
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


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Directory or hub id; only its configuration is read.")],
    max_length: Annotated[
        int | None, typer.Option(min=1, help="KV cache positions per slot.", show_default="2048")
    ] = None,
    gpu: Annotated[
        list[str] | None, typer.Option(metavar="SIZE", help="Memory to fit in, as 24GB or 80GiB; may be repeated.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Show what a model takes of memory in each format, and how many KV slots fit beside it on given GPUs."""
    with stderr.status("computing"):
        found = memory.plan(model, max_length=max_length, memory=gpu or ())
    if as_json:
        print(json.dumps(asdict(found)))
        return
    stdout.print(plan_summary(found))
    stdout.print(plan_table(found))


@app.command()
@connects
def info(
    target: _Target = DEFAULT_TARGET, draft: _Draft = DEFAULT_DRAFT, as_json: _Json = False, *, connecting: Connecting
) -> None:
    """Show what both services run."""

    async def ask() -> tuple[ModelInfo, ModelInfo | None]:
        credentials, theirs = connecting.target, connecting.draft
        async with SpeculativeClient(target, draft, credentials=credentials, draft_credentials=theirs) as client:
            return await client.info()

    ours, theirs = asyncio.run(ask())
    if as_json:
        print(json.dumps({"target": asdict(ours), "draft": asdict(theirs) if theirs else None}))
    else:
        stdout.print(info_table(ours, theirs))


@app.command()
@connects
def health(
    target: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Ask this target service.")] = None,
    draft: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Ask this draft service.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 5.0,
    as_json: _Json = False,
    *,
    connecting: Connecting,
) -> None:
    """Exit with 0 if the services serve, with 1 if one does not; without options both default addresses are asked."""
    asked = {"target": target, "draft": draft}
    if target is None and draft is None:
        asked = {"target": DEFAULT_TARGET, "draft": DEFAULT_DRAFT}

    async def check(name: str, address: str) -> bool:
        credentials = connecting.target if name == "target" else connecting.draft
        service = GrpcTarget(address, credentials)  # every service answers grpc.health.v1
        try:
            return await service.healthy(timeout)
        except SpecpairError as error:
            print(f"{name} {address}: {error}", file=sys.stderr)
            return False
        finally:
            await service.close()

    serving = {name: asyncio.run(check(name, address)) for name, address in asked.items() if address is not None}
    if as_json:
        print(json.dumps({name: {"address": asked[name], "serving": serves} for name, serves in serving.items()}))
    else:
        for name, serves in serving.items():
            print(f"{name} {asked[name]}: {'serving' if serves else 'not serving'}")
    raise typer.Exit(0 if all(serving.values()) else 1)


@app.command()
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
    as_json: _Json = False,
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


app.command()(connects(bench))


def _biases(given: list[str] | None) -> dict[int, float] | None:
    """The biases of options such as 7=-1.5."""
    biases = {}
    for option in given or ():
        token_id, _, value = option.partition("=")
        try:
            biases[int(token_id)] = float(value)
        except ValueError:
            raise InvalidRequestError(f"{option!r} is not ID=VALUE, like 7=-1.5", field="logit_bias") from None
    return biases or None


def _prompt(argument: str | None, file: str | None) -> str:
    if (argument is None) == (file is None):
        raise InvalidRequestError("give either a PROMPT or --prompt-file", field="prompt")
    if argument is not None:
        return argument
    return _read(str(file), "prompt_file")


def _read(file: str, field: str) -> str:
    """The text of a file, or of standard input for -."""
    try:
        return sys.stdin.buffer.read().decode() if file == "-" else Path(file).read_bytes().decode()
    except OSError as error:
        raise InvalidRequestError(f"cannot read {file}: {error.strerror}", field=field) from None
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{file} is not UTF-8 text", field=field) from None
