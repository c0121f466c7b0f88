"""The configuration file of the command: TOML, behind flags and the environment.

Keys at the top are options that several commands share, named as their flags are; a table named after a command has
options of that command.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from platformdirs import user_config_path

from specpair.errors import InvalidRequestError

__all__ = ["CONFIG_VARIABLE", "configure", "keys", "shared_keys"]

CONFIG_VARIABLE = "SPECPAIR_CONFIG"


def configure(context: typer.Context, given: str | None) -> None:
    """Makes a file's values the defaults of a command's options; without a file, those of the user's own one.

    Raises InvalidRequestError that names the key and the file for what is no option or cannot be one's value.
    """
    if context.resilient_parsing:  # shells complete what is not finished
        return
    path = Path(given) if given else user_config_path("specpair") / "config.toml"
    settings = _read(path, required=bool(given))
    commands: Mapping[str, Any] = context.find_root().command.commands  # type: ignore[attr-defined]
    shared = {key for name, command in commands.items() for key in shared_keys(name, command)}
    name = context.info_name or ""
    # An option of this command alone may have the name of one that others share.
    common = shared_keys(name, context.command)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key in commands and isinstance(value, dict):
            known = keys(commands[key])
            for inner in value:
                _check(f"{key}.{inner}", inner in known, path)
        else:
            _check(key, key in shared, path)
            if key in common:
                values[key] = value
    own = settings.get(name, {})
    values.update(own if isinstance(own, dict) else {})
    options = keys(context.command)
    context.default_map = {
        options[key].name: _value(context, options[key], value, key, path) for key, value in values.items()
    }


def keys(command: Any) -> dict[str, Any]:  # noqa: ANN401 - typer's own
    """The options of a command by their names in a file."""
    options = [one for one in command.params if one.param_type_name == "option" and one.envvar]
    return {_key(option): option for option in options if option.envvar != CONFIG_VARIABLE}


def shared_keys(name: str, command: Any) -> dict[str, Any]:  # noqa: ANN401
    """Those that other commands have too: their variables do not bear the command's name."""
    return {key: option for key, option in keys(command).items() if f"_{name}_{key}".upper() not in option.envvar}


def _key(option: Any) -> str:  # noqa: ANN401
    flag: str = next(flag for flag in option.opts if flag.startswith("--"))
    return flag.removeprefix("--").replace("-", "_")


def _read(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and not required:
            return {}
        raise InvalidRequestError(f"cannot read {path}: {error.strerror}", field="config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path} is not TOML: {error}", field="config") from None


def _check(key: str, known: bool, path: Path) -> None:
    if not known:
        raise InvalidRequestError(f"unknown setting (from {path})", field=key)


def _value(context: typer.Context, option: Any, value: object, key: str, path: Path) -> object:  # noqa: ANN401
    """What the option makes of a value, as if it were written behind its flag."""
    wrong = ""
    if option.is_flag != isinstance(value, bool):
        wrong = "must be true or false" if option.is_flag else "must not be true or false"
    elif isinstance(value, dict):
        wrong = "must not be a table"
    elif isinstance(value, list) != bool(option.multiple):
        wrong = "must be a list" if option.multiple else "must not be a list"
    if not wrong:
        text = value if option.is_flag else [str(one) for one in value] if isinstance(value, list) else str(value)
        try:
            option.process_value(context, text)
        except typer.BadParameter as error:
            wrong = error.message.removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
        else:
            return text
    raise InvalidRequestError(f"{wrong}, got {value!r} (from {path})", field=key)
