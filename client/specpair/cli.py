"""Entry of the `specpair` command: needs the extra `cli`, and says so when it is missing.

Exit codes: 0 done, 1 something else failed, 2 the request or its usage is wrong, 3 a service cannot be reached or is
full, 4 the time ran out, 130 interrupted. Errors are one line on stderr: `error: FIELD: what is wrong`.
"""

from __future__ import annotations

import io
import sys

from specpair.errors import (
    DeadlineError,
    DraftMismatchError,
    InvalidRequestError,
    ModelLoadError,
    OverloadedError,
    SpecpairError,
    UnavailableError,
)
from specpair.visible import visible

__all__ = ["exit_code", "main"]

# What the extra brings.
_EXTRA = ("platformdirs", "prompt_toolkit", "rich", "typer")

_EXIT_CODES: dict[type[SpecpairError], int] = {
    InvalidRequestError: 2,
    DraftMismatchError: 2,
    ModelLoadError: 2,
    UnavailableError: 3,
    OverloadedError: 3,
    DeadlineError: 4,
}


def main() -> None:
    """Runs the command and ends the process."""
    for stream in (sys.stdout, sys.stderr):
        # Whatever a model says is written, escaped where the encoding of the stream has no character for it.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        from specpair.commands import app

        app()
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in _EXTRA:
            raise
        _fail("the specpair command needs the extra cli: pip install 'specpair[cli]'", 2)
    except SpecpairError as error:
        _fail(str(error), exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)


def exit_code(error: SpecpairError) -> int:
    """The exit code that stands for an exception."""
    return next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), 1)


def _fail(message: str, code: int) -> None:
    print("error: " + visible(" ".join(message.split())), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
