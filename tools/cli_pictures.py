"""Takes the pictures of the command in docs/images: `python tools/cli_pictures.py [--output DIR] [NAME ...]`.

Real runs against the demo pair on this machine, in a terminal of tmux, as they stand on its screen: what the models say
is always the same, the figures are those of the run. Needs tmux.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from specpair.phases import showing
from specpair.services import started

ROOT = Path(__file__).resolve().parent.parent
MODELS = Path("models/demo")  # as it is to be read on the pictures

# Seconds that anything may take to appear on the screen.
_PATIENCE = 60.0
# The template names a font on the network; pictures are to be read without one.
_FONT = re.compile(r"@font-face \{.*?\}", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """Keys for the terminal, as tmux names them, and what is on its screen when the next step can begin."""

    keys: Sequence[str]
    until: str
    """A regular expression, to be found as often as `times` says."""
    times: int = 1


@dataclass(frozen=True)
class Picture:
    """A terminal of a size and what is typed into it."""

    columns: int
    rows: int
    steps: Sequence[Step]


_SAMPLING = "--temperature 0.8 --top-p 0.9 --seed 1"
_PROMPTS = {
    "median.py": "low-median",
}
_PICTURES = {
    "cli-generate": Picture(
        100,
        26,
        [
            Step(
                [f"specpair generate --prompt-file median.py --max-new-tokens 80 {_SAMPLING}", "Enter"],
                r"tokens in .*accepted \(\d+%\)",
            )
        ],
    ),
    "cli-chat": Picture(
        110,
        34,
        [
            Step([f"specpair chat --plain --max-new-tokens 48 {_SAMPLING}", "Enter"], r"Ctrl-D ends"),
            Step(["def add(a, b):", "M-Enter", '    """Adds two numbers."""', "Enter"], r"tokens/s\s"),
            Step(["def subtract(a, b):", "Enter"], r"tokens/s\s", 2),
            Step(["/params temperature= top_p=", "Enter"], r"seed=1 max_new_tokens=48\s"),
        ],
    ),
    "cli-explain": Picture(
        118,
        24,
        [Step(["specpair explain 'def __init__(self, name):' --draft $SPECPAIR_DRAFT", "Enter"], r"not reached\s+\$$")],
    ),
}


class Terminal:
    """A shell in a terminal of tmux, on a server of its own, which ends with the block."""

    def __init__(self, picture: Picture, directory: Path, environment: dict[str, str]) -> None:
        self._picture = picture
        self._directory = directory
        self._environment = environment

    def __enter__(self) -> Terminal:
        size = ["-x", str(self._picture.columns), "-y", str(self._picture.rows)]
        self._tmux("-f", os.devnull, "new-session", "-d", *size, "env PS1='$ ' bash --norc --noprofile")
        return self

    def __exit__(self, *error: object) -> None:
        self._tmux("kill-server")

    def do(self, step: Step) -> None:
        """Types, and waits. Raises TimeoutError."""
        for key in step.keys:
            named = key in ("Enter", "M-Enter")
            self._tmux("send-keys", *([] if named else ["-l"]), key)
            time.sleep(0.2)
        deadline = time.monotonic() + _PATIENCE
        while len(re.findall(step.until, self.screen().rstrip())) < step.times:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{step.until!r} did not appear:\n{self.screen()}")
            time.sleep(0.1)
        time.sleep(0.5)  # for the prompt behind it

    def screen(self, *flags: str) -> str:
        """The lines on the screen."""
        return self._tmux("capture-pane", "-p", *flags)

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-S", str(self._directory / "tmux"), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=self._directory, env=self._environment
        ).stdout


def take(name: str, picture: Picture, directory: Path, environment: dict[str, str]) -> str:
    """The picture as SVG."""
    with Terminal(picture, directory, environment) as terminal:
        time.sleep(0.5)
        for step in picture.steps:
            terminal.do(step)
        screen = Text.from_ansi(terminal.screen("-e").rstrip())
    console = Console(
        record=True, file=io.StringIO(), width=picture.columns, color_system="truecolor", force_terminal=True
    )
    console.print(screen, soft_wrap=True)
    svg = console.export_svg(title="specpair", unique_id=name)
    return "\n".join(line.rstrip() for line in _FONT.sub("", svg).splitlines()) + "\n"


def main() -> None:
    """Takes all pictures, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(_PICTURES)}; default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    given = parser.parse_args()
    output = given.output.resolve()
    os.chdir(ROOT)
    texts = {one["name"]: one["text"] for one in json.loads((MODELS / "prompts.json").read_text())}
    flags = ["--threads", "1", "--log-format", "console"]
    with (
        tempfile.TemporaryDirectory(prefix="specpair-pictures-") as temporary,
        started(
            ["--model", str(MODELS / "target"), *flags], ["--model", str(MODELS / "draft"), "--dtype", "fp32", *flags]
        ) as (target, draft),
    ):
        directory = Path(temporary)
        for file, prompt in _PROMPTS.items():
            (directory / file).write_text(texts[prompt])
        with showing() as show:
            for service in (target, draft):
                asyncio.run(service.wait(show))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SPECPAIR_", "TMUX"))},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TERM": "xterm-256color",
            "XDG_CONFIG_HOME": temporary,
            "XDG_STATE_HOME": temporary,
            "SPECPAIR_TARGET": target.address,
            "SPECPAIR_DRAFT": draft.address,
        }
        environment.pop("NO_COLOR", None)
        for name in given.names or _PICTURES:
            (output / f"{name}.svg").write_text(take(name, _PICTURES[name], directory, environment))


if __name__ == "__main__":
    main()
