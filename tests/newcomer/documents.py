"""What the documentation tells people to type: the commands of its console blocks, and its Python."""

from __future__ import annotations

import functools
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Where no documentation of the project is; nor in folders whose names begin with a dot.
_ELSEWHERE = {"node_modules", "runs", "build", "dist", "site", "secrets"}
_FENCE = re.compile(r"(?P<indent> *)(?P<fence>```+)(?P<language>\w*)")
# Nothing would type what stands in these.
_OTHER_SHELLS = {"bash", "sh", "shell", "zsh"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    """Path from the root of the repository."""
    line: int
    language: str
    text: str

    @property
    def place(self):
        """Where it stands, for messages."""
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a console block, with the output that is shown for it, if any."""

    place: str
    text: str
    shown: str

    @property
    def words(self):
        """Its words, without comments."""
        return shlex.split(self.text.replace("\\\n", " "), comments=True)


@functools.cache
def documents():
    """All documents that have blocks, README.md first, as paths from the root."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in _ELSEWHERE and not name.startswith(".")]
        found += [str((Path(folder) / name).relative_to(ROOT)) for name in files if name.endswith(".md")]
    return [name for name in sorted(found, key=lambda name: (name != "README.md", name)) if blocks(name)]


@functools.cache
def blocks(document):
    """The console and Python blocks of a document, in order."""
    lines = iter(enumerate((ROOT / document).read_text().splitlines(), start=1))
    found = []
    for number, line in lines:
        if not (opened := _FENCE.match(line)):
            continue
        body = []
        for _, inside in lines:
            if inside.strip() == opened["fence"]:
                break
            body.append(inside.removeprefix(opened["indent"]))
        else:
            raise AssertionError(f"{document}:{number}: a block that does not end")
        assert opened["language"] not in _OTHER_SHELLS, f"{document}:{number}: commands belong into a console block"
        if opened["language"] in {"console", "python"}:
            found.append(Block(str(document), number, opened["language"], "\n".join(body) + "\n"))
    return found


def commands(block):
    """The commands of a console block."""
    found = []
    lines = iter(enumerate(block.text.splitlines(), start=block.line + 1))
    for number, line in lines:
        place = f"{block.document}:{number}"
        if line.startswith("$ "):
            text = line.removeprefix("$ ")
            while _goes_on(text):
                text += "\n" + next(lines)[1]
            found.append(Command(place, text, ""))
        else:
            assert found, f"{place}: output without a command"
            last = found.pop()
            found.append(Command(last.place, last.text, f"{last.shown}{line}\n"))
    return found


def all_commands():
    """The commands of all documents."""
    return [
        command
        for document in documents()
        for block in blocks(document)
        if block.language == "console"
        for command in commands(block)
    ]


def _goes_on(text):
    if text.endswith("\\"):
        return True
    try:
        shlex.split(text, comments=True)
    except ValueError:  # inside quotes
        return True
    return False
