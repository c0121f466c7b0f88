"""Texts that a command is given: as an argument, in a file, or on standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from specpair.errors import InvalidRequestError

__all__ = ["prompt_text", "read_text"]


def prompt_text(argument: str | None, file: str | None) -> str:
    """The prompt. Raises InvalidRequestError unless it is given once, and for a file that cannot be read."""
    if (argument is None) == (file is None):
        raise InvalidRequestError("give either a PROMPT or --prompt-file", field="prompt")
    return argument if argument is not None else read_text(str(file), "prompt_file")


def read_text(file: str, field: str) -> str:
    """The text of a file, or of standard input for -. Raises InvalidRequestError, naming the field."""
    try:
        return sys.stdin.buffer.read().decode() if file == "-" else Path(file).read_bytes().decode()
    except OSError as error:
        raise InvalidRequestError(f"cannot read {file}: {error.strerror}", field=field) from None
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{file} is not UTF-8 text", field=field) from None
