"""Writes the tables of options in docs/cli.md from the commands themselves: `python tools/cli_reference.py [--check]`.

A table stands between `<!-- options: NAME -->` and `<!-- end -->`; NAME is a command, or a group of options that
several commands share.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from typer.main import get_command

from specpair.commands import app
from specpair.commands.configuring import keys, shared_keys

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

_BLOCK = re.compile(r"(<!-- options: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables() -> dict[str, str]:
    """Markdown by the name of a command or of a group."""
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    groups: dict[str, dict[str, Any]] = {}
    for name, command in commands.items():
        for key, option in shared_keys(name, command).items():
            groups.setdefault(option.rich_help_panel, {}).setdefault(key, option)
    found = {group: _table(options) for group, options in groups.items()}
    for name, command in commands.items():
        shared = shared_keys(name, command)
        own = {key: option for key, option in keys(command).items() if key not in shared}
        found[name] = _table(own) + _also(set(shared), groups)
    return found


def written(page: str) -> str:
    """The page with its tables as they have to be. Raises KeyError for a table of nothing."""
    known = tables()
    return _BLOCK.sub(lambda block: block[1] + "\n" + known[block[2]] + "\n" + block[3], page)


def _table(options: dict[str, Any]) -> str:
    lines = ["| option | environment | file | |", "| --- | --- | --- | --- |"]
    for key, option in options.items():
        flags = " / ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])
        lines.append(f"| {flags} | `{option.envvar}` | `{key}` | {_meaning(option)} |")
    return "\n".join(lines) + "\n"


def _meaning(option: Any) -> str:  # noqa: ANN401 - typer's own
    default = option.show_default if isinstance(option.show_default, str) else option.default
    shown = f" Default: {default}." if default not in (None, False) and option.show_default else ""
    return (option.help + shown).replace("|", "\\|")


def _also(shared: set[str], groups: dict[str, dict[str, Any]]) -> str:
    """Which shared options a command has besides: whole groups by name, others one by one."""
    parts = []
    for group, options in groups.items():
        had = [f"`--{key.replace('_', '-')}`" for key in options if key in shared]
        if len(had) == len(options):
            parts.append(f"[{group.lower()}](#{group.lower()})")
        elif had:
            parts.append(f"of [{group.lower()}](#{group.lower()}) {', '.join(had)}")
    return f"\nAnd {'; '.join(parts)}.\n" if parts else ""


def main() -> None:
    """Writes the page, or says with exit code 1 that it has to be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something had to be")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    if check:
        sys.exit(written(page) != page)
    PAGE.write_text(written(page), encoding="utf-8")


if __name__ == "__main__":
    main()
