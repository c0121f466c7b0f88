"""What every command has in common: groups of options, environment variables, and the configuration file."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from specpair.commands.configuring import CONFIG_VARIABLE, configure

__all__ = ["declared", "variable"]

# Names that begin like this are settings of the services.
_SERVICES = ("TARGET_", "DRAFT_", "GATEWAY_")

_Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        envvar=CONFIG_VARIABLE,
        is_eager=True,
        callback=configure,
        help="TOML file of these options.",
        show_default="the user's specpair/config.toml, if there is one",
    ),
]


def variable(flag: str, command: str = "") -> str:
    """The environment variable of a flag: of all commands that have it, or of one command's own."""
    parts = [command, flag.lstrip("-")] if command else [flag.lstrip("-")]
    name = "_".join(parts).upper().replace("-", "_")
    return f"SPECPAIR_CLIENT_{name}" if name.startswith(_SERVICES) else f"SPECPAIR_{name}"


def declared(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer takes it.

    A parameter whose type is a dataclass stands for the options that its fields are, which all commands with that group
    share. Every option can be set in the environment too: a shared one as SPECPAIR_OPTION, any other one as
    SPECPAIR_COMMAND_OPTION. `--config` is added.
    """
    hints = get_type_hints(command, include_extras=True)
    signature = inspect.signature(command)
    groups = {name: hints[name] for name in signature.parameters if is_dataclass(hints[name])}
    parameters: list[inspect.Parameter] = []
    for name, given in signature.parameters.items():
        if name in groups:
            parameters += _options(groups[name])
        else:
            parameters.append(_parameter(name, hints[name], given.default, command.__name__))
    parameters.append(_parameter("config", _Config, None))

    @functools.wraps(command)
    def run(**given: Any) -> None:  # noqa: ANN401
        del given["config"]  # its callback has read the file
        made = {
            name: group(**{option.name: given.pop(option.name) for option in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    del run.__wrapped__  # typer would read the signature from there
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options(group: Any) -> Iterator[inspect.Parameter]:  # noqa: ANN401 - a dataclass
    annotations: Mapping[str, Any] = get_type_hints(group, include_extras=True)
    for option in fields(group):
        yield _parameter(option.name, annotations[option.name], option.default)


def _parameter(name: str, annotation: Any, default: Any, command: str = "") -> inspect.Parameter:  # noqa: ANN401
    """A parameter with its environment variable, unless it has one or is no option."""
    if get_origin(annotation) is Annotated:
        kind, *notes = get_args(annotation)
        annotation = Annotated[(kind, *(_with_variable(note, name, command) for note in notes))]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with_variable(note: object, name: str, command: str) -> object:
    if not isinstance(note, OptionInfo) or note.envvar is not None:
        return note
    note = copy.copy(note)
    # What typer.Option is given first counts as a default until typer knows that it stands in an annotation.
    given = [note.default, *(note.param_decls or ())]
    flag = next((part for part in given if isinstance(part, str) and part.startswith("--")), name)
    note.envvar = variable(flag.partition("/")[0], command)
    return note
