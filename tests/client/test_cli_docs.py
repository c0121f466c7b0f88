"""Laws of docs/cli.md: it says what the commands say themselves."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from typer.main import get_command

from specpair.chat.slash import COMMANDS as TYPED
from specpair.commands import app

from .commanding import command

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cli.md").read_text()
COMMANDS = get_command(app).commands


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "tools" / "cli_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_commands(reference):
    """`python tools/cli_reference.py` would change nothing, and every table has its place."""
    assert reference.written(PAGE) == PAGE
    assert set(re.findall(r"<!-- options: (\w+) -->", PAGE)) == set(reference.tables())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_help_is_on_the_page(name):
    """In the command's own section or among the shared options; nothing there that --help does not know."""
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", command(name, "--help").stdout)) - {"--help", "--config"}
    section = PAGE.partition(f"## specpair {name}\n")[2].partition("\n## ")[0]
    shared = PAGE.partition("## Shared options\n")[2]
    table = set(re.findall(r"`(--[a-z-]+)`", "\n".join(re.findall(r"^\|.*\|$|^And .*$", section, re.MULTILINE))))
    assert flags <= table | set(re.findall(r"`(--[a-z-]+)`", shared))
    assert table - {"--plain", "--help"} <= flags


def test_what_can_be_typed_in_a_chat_is_on_the_page():
    """Each command with its usage."""
    for name, (usage, _) in TYPED.items():
        assert f"| `{f'{name} {usage}'.strip()}` |" in PAGE


def test_exit_codes_are_those_of_help():
    """The page and --help name the same codes."""
    shown = " ".join(command("--help").stdout.split())
    codes = set(re.findall(r"\b(\d+) (?=[a-z])", shown.partition("Exit codes: ")[2].partition(". ")[0]))
    said = PAGE.partition("**Exit codes.** ")[2].partition("An error is")[0]
    assert codes == set(re.findall(r"\b(\d+)\b(?= )", said)) == {"0", "1", "2", "3", "4", "130"}


def test_pictures_are_there_and_stand_alone():
    """Every picture of the page is a file that takes nothing from the network."""
    pictures = re.findall(r"!\[[^\]]+\]\((images/[^)]+)\)", PAGE)
    assert len(pictures) == 3
    for picture in pictures:
        svg = (ROOT / "docs" / picture).read_text()
        assert "font-face" not in svg
        assert set(re.findall(r"https?://[^\s\"')]+", svg)) <= {
            "http://www.w3.org/2000/svg",
            "https://www.textualize.io",
        }
