"""Lines of a chat that are no part of the conversation: /help and so on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from specpair.errors import InvalidRequestError
from specpair.params import AcceptanceRule, SamplingParams

__all__ = ["COMMANDS", "changed", "described", "parsed"]

COMMANDS: Mapping[str, tuple[str, str]] = {
    "/help": ("", "Show this."),
    "/reset": ("", "Forget what was said; the system message stays."),
    "/system": ("[TEXT]", "Show the system message, or change it."),
    "/params": ("[NAME=VALUE ...]", "Show the sampling parameters, or change some; NAME= is the default."),
    "/explain": ("", "Show what the draft proposes where the last answer began, and why the target takes it or not."),
    "/save": ("FILE", "Write the conversation to a file: JSON, or with --plain text."),
    "/quit": ("", "End, as Ctrl-D does."),
}

_KINDS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), float),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), float),
    **dict.fromkeys(("top_k", "seed", "max_new_tokens", "min_new_tokens"), int),
    "rule": AcceptanceRule,
}


def parsed(line: str) -> tuple[str, str] | None:
    """Name and argument of a command; None for what is to be said. A second slash in front says a slash.

    Raises InvalidRequestError for a name that there is not.
    """
    if not line.startswith("/") or line.startswith("//"):
        return None
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        raise InvalidRequestError("there is no such command; /help shows all, // says a slash", field=name)
    return name, argument.strip()


def changed(params: SamplingParams, argument: str) -> SamplingParams:
    """Parameters changed as told, NAME=VALUE with blanks between. Raises InvalidRequestError."""
    changes: dict[str, Any] = {}
    for part in argument.split():
        name, equals, value = part.partition("=")
        name = name.replace("-", "_")
        if name not in _KINDS or not equals:
            raise InvalidRequestError(f"{part!r} is not NAME=VALUE with one of {', '.join(_KINDS)}", field="/params")
        try:
            changes[name] = _KINDS[name](value) if value else None
        except ValueError:
            raise InvalidRequestError(f"{value!r} is no value of {name}", field="/params") from None
    return replace(params, **changes)


def described(params: SamplingParams) -> str:
    """The parameters that are not at their defaults."""
    given = {one.name: getattr(params, one.name) for one in fields(params)}
    default = SamplingParams()
    shown = [f"{name}={value}" for name, value in given.items() if value != getattr(default, name)]
    return " ".join(shown) or "all at their defaults"
