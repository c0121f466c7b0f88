"""Examples as processes: the command that a file's docstring names, with the addresses of a test."""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

from ..e2e.processes import environment

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# Stands for "does not hang", in seconds.
BOUND = 120


def command(name, **options):
    """The command of an example, with other values for some of its options: `listen="127.0.0.1:0"`."""
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
    [shown] = re.findall(rf"^ *(python examples/{name}\.py(?:.*\\\n)*.*)$", text, re.MULTILINE)
    words = shlex.split(shown.replace("\\\n", " "))
    for option, value in options.items():
        flag = f"--{option.replace('_', '-')}"
        assert flag in words, f"the command of {name} has no {flag}"
        words[words.index(flag) + 1] = str(value)
    return [sys.executable, *words[1:]]


def run(name, *more, stdin="", expect=(0,), **options):
    """What an example prints, on both streams, with more arguments than its command has, and how it ends."""
    return finished([*command(name, **options), *more], stdin=stdin, expect=expect)


def finished(words, *, stdin="", expect=(0,)):
    """What a command prints, on both streams, in the directory that readers start it in; one of `expect` is its end."""
    done = subprocess.run(
        words,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=BOUND,
        cwd=ROOT,
        env=environment(),
        check=False,
    )
    assert done.returncode in expect, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@contextlib.contextmanager
def running(name, **options):
    """An example under way, as a process whose output is read line by line; it has to end by itself or by SIGTERM."""
    with subprocess.Popen(
        command(name, **options),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment(),
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(BOUND)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
