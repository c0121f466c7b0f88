"""Commands whose packages come by an extra: where it is missing they say so in one line, not by a traceback."""

from __future__ import annotations

import sys
from importlib import import_module

__all__ = ["launch"]


def launch(command: str, extra: str, module: str) -> None:
    """Runs `main` of a module. Ends the process with 2 if something that it imports is not installed."""
    try:
        main = import_module(module).main
    except ModuleNotFoundError as missing:
        name = (missing.name or "").partition(".")[0]
        if name.startswith("specpair"):
            raise
        hint = f"error: {command} needs the extra {extra}: pip install 'specpair[{extra}]' ({name} is not installed)"
        print(hint, file=sys.stderr)
        sys.exit(2)
    main()
