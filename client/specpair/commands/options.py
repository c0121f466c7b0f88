"""The options that several commands have, in groups by what they are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from specpair.client import DEFAULT_DRAFT, DEFAULT_TARGET, ClientOptions, SpeculativeClient
from specpair.connecting import Connecting
from specpair.errors import InvalidRequestError
from specpair.params import AcceptanceRule, SamplingParams

__all__ = [
    "Draft",
    "Ending",
    "Json",
    "Sampling",
    "Services",
    "Speculating",
    "Target",
    "Text",
    "TextFile",
    "opened",
]

_SERVICES = "Services"
_SAMPLING = "Sampling"
_SPECULATION = "Speculation"

Target = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT[,...]",
        envvar="SPECPAIR_TARGET",
        help="Address of the target service, or of several that run the same.",
        rich_help_panel=_SERVICES,
    ),
]
Draft = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT|ngram|none|auto[:HOST:PORT]",
        envvar="SPECPAIR_DRAFT",
        help="Who proposes: a draft service, prompt lookup, nobody, or a draft service if its vocabulary fits.",
        rich_help_panel=_SERVICES,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Text = Annotated[str | None, typer.Argument(help="Text to continue.", show_default=False)]
TextFile = Annotated[str | None, typer.Option(metavar="FILE", help="Take the text from a file; - is standard input.")]


def _option(text: str, panel: str, *flags: str, **others: Any) -> Any:  # noqa: ANN401 - typer's own
    return typer.Option(*flags, help=text, show_default=False, rich_help_panel=panel, **others)


@dataclass(frozen=True)
class Services:
    """Where the services are."""

    target: Target = DEFAULT_TARGET
    draft: Draft = DEFAULT_DRAFT
    connect_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="Longest wait for what the services run.", rich_help_panel=_SERVICES
        ),
    ] = 5.0


@dataclass(frozen=True)
class Speculating:
    """How to speculate, and how long to wait for services that are lost."""

    draft_length: Annotated[
        int | None, _option("Tokens to propose per round; default: what is fastest.", _SPECULATION)
    ] = None
    lookup: Annotated[
        bool | None,
        _option(
            "Let prompt lookup propose beside the draft's model where that is faster; default: yes, but not with "
            "--draft-length or the rejection rule.",
            _SPECULATION,
            "--lookup/--no-lookup",
        ),
    ] = None
    chain: Annotated[
        int | None, _option("Blocks to send ahead of a verdict; default: what is fastest.", _SPECULATION)
    ] = None
    draft_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Longest that the draft may take for one round.", rich_help_panel=_SPECULATION
        ),
    ] = 2.0
    resume_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Longest that the target may be away in a generation; 0: losing it is an error.",
            rich_help_panel=_SPECULATION,
        ),
    ] = 30.0

    @property
    def options(self) -> ClientOptions:
        """As a client takes them."""
        return {
            "draft_length": self.draft_length,
            "lookup": self.lookup,
            "chain": self.chain,
            "draft_timeout": self.draft_timeout,
            "resume_timeout": self.resume_timeout,
        }


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: Annotated[float | None, _option("0, the default, is greedy.", _SAMPLING)] = None
    top_k: Annotated[int | None, _option("Keep the k most probable tokens.", _SAMPLING)] = None
    top_p: Annotated[float | None, _option("Keep this much probability.", _SAMPLING)] = None
    min_p: Annotated[float | None, _option("Keep tokens at least so probable, relative to the best.", _SAMPLING)] = None
    repetition_penalty: Annotated[
        float | None, _option("Above 1: make tokens of prompt and output less likely.", _SAMPLING)
    ] = None
    presence_penalty: Annotated[float | None, _option("Taken from the score of generated tokens.", _SAMPLING)] = None
    frequency_penalty: Annotated[
        float | None, _option("The same, once for each time that a token was generated.", _SAMPLING)
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        _option("Added to the score of a token; may be repeated.", _SAMPLING, metavar="ID=VALUE"),
    ] = None
    seed: Annotated[int | None, _option("Seed of the noise.", _SAMPLING)] = None
    rule: Annotated[AcceptanceRule | None, _option("How proposals are judged; default: coupled.", _SAMPLING)] = None

    @property
    def params(self) -> SamplingParams:
        """As a client takes them. Raises InvalidRequestError for a bias that is none."""
        return SamplingParams(**{**asdict(self), "logit_bias": _biases(self.logit_bias)})


@dataclass(frozen=True)
class Ending:
    """When an output ends."""

    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens to generate.", show_default="128, in a chat 512", rich_help_panel=_SAMPLING),
    ] = None
    min_new_tokens: Annotated[int | None, _option("Tokens before the sequence may end.", _SAMPLING)] = None
    stop: Annotated[list[str] | None, _option("Stop at this text; may be repeated.", _SAMPLING, metavar="TEXT")] = None
    stop_token_id: Annotated[
        list[int] | None, _option("Stop at this token; may be repeated.", _SAMPLING, metavar="ID")
    ] = None
    ignore_eos: Annotated[bool, _option("Go on behind the end of the sequence.", _SAMPLING, "--ignore-eos")] = False

    def params(self, max_new_tokens: int) -> dict[str, Any]:
        """The fields of SamplingParams; the number is the command's own default."""
        return {
            "max_new_tokens": max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "stop": tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_id or ()),
            "ignore_eos": self.ignore_eos,
        }


def opened(services: Services, connecting: Connecting, speculating: Speculating | None = None) -> SpeculativeClient:
    """A client as told."""
    options: ClientOptions = {
        **(speculating.options if speculating is not None else ClientOptions()),
        "connect_timeout": services.connect_timeout,
        "credentials": connecting.target,
        "draft_credentials": connecting.draft,
    }
    return SpeculativeClient(services.target, services.draft, **options)


def _biases(given: Sequence[str] | None) -> dict[int, float] | None:
    """The biases of options such as 7=-1.5."""
    biases = {}
    for option in given or ():
        token_id, _, value = option.partition("=")
        try:
            biases[int(token_id)] = float(value)
        except ValueError:
            raise InvalidRequestError(f"{option!r} is not ID=VALUE, like 7=-1.5", field="logit_bias") from None
    return biases or None
