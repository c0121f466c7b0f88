"""A shell in which one command is typed after another, each within bounds."""

from __future__ import annotations

import subprocess
from pathlib import Path

# The command stands in a file of its own, so that nothing has to be quoted.
_SCRIPT = """\
set -a -o pipefail
if [ -e "$STATE/variables" ]; then . "$STATE/variables"; fi
. "$STATE/command"
status=$?
{ export -p; declare -f; } > "$STATE/variables"
exit $status
"""


class Shell:
    """Commands in one directory; each knows the variables and functions that those before it have set."""

    def __init__(self, directory: Path, state: Path, environment: dict[str, str]) -> None:
        self._directory = directory
        self._state = state
        self._environment = {**environment, "STATE": str(state)}

    def run(self, command: str, within: float) -> subprocess.CompletedProcess[str]:
        """What a command does. Fails after `within` seconds."""
        (self._state / "command").write_text(command + "\n")
        return subprocess.run(
            ["bash", "-c", _SCRIPT],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within,
            cwd=self._directory,
            env=self._environment,
            check=False,
        )
