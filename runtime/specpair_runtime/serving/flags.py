"""Command line flags made from the fields of a settings class.

pydantic-settings can make them too; this shows the environment variable of each in `--help`, and leaves every check of
a value to the model, so that a bad value is reported alike wherever it came from.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

CONFIG = "config"


def flag_name(field: str) -> str:
    """The flag of a field: `verify_width` is `--verify-width`."""
    return "--" + field.replace("_", "-")


def read_flags(
    fields: Mapping[str, FieldInfo],
    argv: Sequence[str] | None,
    *,
    prog: str | None,
    description: str | None,
    env_prefix: str,
) -> dict[str, Any]:
    """The flags that were given, by field name, as unchecked text; booleans as booleans; `config` is a file's path.

    Raises SystemExit(0) after --help and SystemExit(2) for an unknown or an incomplete flag.
    """
    summary = (description or "").strip().splitlines()
    parser = _Parser(
        prog=prog,
        description=summary[0] if summary else None,
        epilog="A flag goes before its environment variable, which goes before the configuration file.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name, field in fields.items():
        help_text = f"{field.description or ''} {_origin(name, field, env_prefix)}".strip().replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag_name(name), dest=name, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            parser.add_argument(flag_name(name), dest=name, metavar=_metavar(field.annotation), help=help_text)
    parser.add_argument(
        flag_name(CONFIG),
        metavar="FILE.toml",
        help=f'TOML file of settings, `log_level = "info"` and so on. [{_env(CONFIG, env_prefix)}]',
    )
    return vars(parser.parse_args(argv))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\nTry {self.prog} --help\n")


def _env(field: str, prefix: str) -> str:
    return f"{prefix}{field}".upper()


def _origin(name: str, field: FieldInfo, env_prefix: str) -> str:
    default = field.get_default(call_default_factory=False)
    if field.is_required():
        shown = "required; "
    elif default is None or default == "":
        shown = ""
    else:
        shown = f"default: {_value(default)}; "
    return f"[{shown}{_env(name, env_prefix)}]"


def _value(default: Any) -> str:  # noqa: ANN401
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _metavar(annotation: Any) -> str:  # noqa: ANN401
    if get_origin(annotation) is Literal:
        return "{" + ",".join(str(choice) for choice in get_args(annotation)) + "}"
    if get_origin(annotation) in (Union, types.UnionType):
        return "|".join(_metavar(part) for part in get_args(annotation) if part is not type(None))
    return {int: "N", float: "X"}.get(annotation, "TEXT")
