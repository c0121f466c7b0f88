"""The `specpair` command as a process of its own, which nothing of ours configures."""

from __future__ import annotations

import os
import subprocess
import sys

COMMAND = [sys.executable, "-m", "specpair.cli"]


def environment(**extra):
    """No setting of the command or the services, no file of the user's, plain output."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SPECPAIR_")}
    plain = {"NO_COLOR": "1", "COLUMNS": "120", "XDG_CONFIG_HOME": os.devnull, "XDG_STATE_HOME": os.devnull}
    return {**inherited, **plain, **extra}


def command(*arguments, stdin=None, **extra):
    """Runs it to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(**extra),
        check=False,
    )
