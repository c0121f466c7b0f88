"""A copy of the project in which what the documentation says is done, with services on free ports."""

from __future__ import annotations

import ast
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import grpc
import httpx

from ..e2e.processes import Service, environment
from ..e2e.test_turns import TEMPLATE
from . import grpcurl
from .documents import ROOT
from .shell import Shell

# Stands for "does not hang", in seconds.
BOUND = 180
# Of a slot, so that what has no other end does not take long.
_LENGTH = "384"
# A command that starts a service, as far as its name.
_STARTS = re.compile(r"(?:\.venv/bin/)?specpair-(?P<role>target|draft|gateway) ")
_PAIR = {
    "target": ".venv/bin/specpair-target --model models/demo/target",
    "draft": ".venv/bin/specpair-draft --model models/demo/draft",
    "gateway": ".venv/bin/specpair-gateway --target 127.0.0.1:50051 --draft 127.0.0.1:50052",
}
_ADDRESS = {"target": "127.0.0.1:50051", "draft": "127.0.0.1:50052", "gateway": "127.0.0.1:8000"}
# What the documentation calls what readers have, and what stands for it here.
_STAND_INS = {
    r"\bMODEL\b": "models/demo/target",
    r"\btarget\.example\b": "localhost",
    r"\b10\.0\.0\.5\b": "127.0.0.1",
    r"\b9467\b": "0",  # a port of the reader's own program
    # Defaults of the client library; the command has the environment for that.
    r"SpeculativeClient\(\)": 'SpeculativeClient("127.0.0.1:50051", "127.0.0.1:50052")',
}
# Files that the documentation takes readers to have.
_FILES = {"prompt.txt": "import os\n", "before.py": "def first(items):\n    return items[0]\n"}
# An example, which has its addresses as options.
_EXAMPLE = re.compile(r"(\bexamples/[\w/]+\.(?:py|mjs))\b")
# Around a piece of Python that awaits at its top level: what the text before it has introduced.
_AROUND = """\
import asyncio
from specpair import *

async def main():
    params = SamplingParams(max_new_tokens=16)
    async with SpeculativeClient("127.0.0.1:50051", "127.0.0.1:50052") as client:
{}
asyncio.run(main())
"""


class Gateway(Service):
    """The gateway, which is asked for its health over HTTP."""

    def __init__(self, log, *flags, **options):
        def connect(address):
            return httpx.Client(base_url=f"http://{address}", timeout=BOUND)

        super().__init__("gateway", log, *flags, "--listen=127.0.0.1:0", listen=False, connect=connect, **options)

    def _healthy(self):
        self._check()
        try:
            return self._channel.get("/health").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False


class Place:
    """The copy, a shell in it, and the services that were started there."""

    def __init__(self, directory: Path, launch) -> None:
        self.directory = directory / "specpair"
        self._logs = directory
        self._launch = launch
        self._services: dict[str, Service] = {}
        # Documented address: that of the service that listens there.
        self.addresses: dict[str, str] = {}
        for name in _cloned():
            (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.directory / name, follow_symlinks=False)
        (self.directory / ".venv").symlink_to(sys.prefix)
        if (modules := ROOT / "examples/node/node_modules").exists():
            (self.directory / "examples/node/node_modules").symlink_to(modules)
        # The demo pair has no chat template, and what the documentation says of conversations needs one.
        (self.directory / "models/demo/target/chat_template.jinja").write_text(TEMPLATE)
        for name, text in _FILES.items():
            (self.directory / name).write_text(text)
        self._tools = directory / "tools"
        self._tools.mkdir()
        self._tool("run-what-needs-it", "exit 0")
        if grpcurl.buf() is not None:
            self._tool("grpcurl", f'exec {sys.executable} {grpcurl.__file__} "$@"')

    def _tool(self, name, line):
        """A program on the shell's path."""
        path = self._tools / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def shell(self) -> Shell:
        """A fresh shell."""
        state = Path(self._logs / f"shell-{len(list(self._logs.glob('shell-*')))}")
        state.mkdir()
        return Shell(self.directory, state, self._environment)

    @functools.cached_property
    def _environment(self):
        path = f"{self._tools}:{Path(sys.executable).parent}:{environment()['PATH']}"
        pair = {"SPECPAIR_TARGET": self.address("target"), "SPECPAIR_DRAFT": self.address("draft")}
        around = {name: text for name, text in environment(PATH=path, **pair).items() if not name.startswith("XDG_")}
        return {**around, "HOME": str(self._logs)}

    def address(self, role: str) -> str:
        """Where a service of the pair, or the gateway, listens; started as README.md says if it does not run yet."""
        if role not in self._services:
            # The other half of the pair begins to load at the same time.
            for half in (role,) if role == "gateway" else ("target", "draft"):
                self._start(half, shlex.split(self.filled(_PAIR[half])))
        return self._services[role].address

    def starts(self, command: str) -> str | None:
        """The role of the service that a command starts, if it does."""
        found = _STARTS.match(command)
        return found["role"] if found and "--help" not in command else None

    def start(self, command: str) -> None:
        """Starts a service at free ports in place of the documented ones, and waits until it is healthy.

        One that runs already, with the same options, is not started again.
        """
        role = self.starts(command)
        filled = self.filled(command.replace("MODEL", f"models/demo/{role}"))
        words = shlex.split(filled.replace("\\\n", " "), comments=True)
        listens = {}
        for option in ("--listen", "--metrics-listen"):
            if option in words:
                at = words.index(option)
                listens[option] = words[at + 1]
                del words[at : at + 2]
        as_usual = words[1:] == shlex.split(self.filled(_PAIR[role]))[1:]
        service = self._start(role if as_usual else f"{role}: {command}", words)
        port = service.address.rpartition(":")[2]
        if (listen := listens.get("--listen")) is not None:
            for name, actual in (("target.example", "localhost"), ("0.0.0.0", "127.0.0.1")):
                self.addresses[listen.replace("0.0.0.0", name)] = f"{actual}:{port}"
        if (listen := listens.get("--metrics-listen")) is not None:
            self.addresses[listen] = _event(service, "serving metrics")["address"]

    def _start(self, name, words):
        if name not in self._services:
            role = name.partition(":")[0]
            launcher = ["env", "-C", self.directory, self.directory / ".venv/bin" / Path(words[0]).name]
            if role == "gateway":
                self._services[name] = Gateway(self._logs / "gateway.log", *words[1:], launcher=launcher)
                return self._services[name]
            short = {f"SPECPAIR_{role.upper()}_MAX_LENGTH": _LENGTH, "HOME": str(self._logs)}
            # Metrics are always on, so that no document needs services of its own for them.
            metrics = {f"SPECPAIR_{role.upper()}_METRICS_LISTEN": "127.0.0.1:0"}
            options = {"launcher": launcher, "env": short | metrics}
            if "--tls-client-ca" in words:
                options["connect"] = self._certified
            self._services[name] = self._launch(role, *words[1:], **options)
        return self._services[name]

    def _certified(self, address):
        """A channel with the files that docs/security.md makes."""
        ca, key, cert = ((self.directory / name).read_bytes() for name in ("ca.pem", "alice-key.pem", "alice.pem"))
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert))

    def filled(self, text: str) -> str:
        """A text with the addresses and models that there are here in place of those of the documentation."""
        for address, actual in self.addresses.items():
            text = text.replace(address, actual)
        for pattern, stand_in in _STAND_INS.items():
            text = re.sub(pattern, stand_in, text)
        for option in ("target", "draft"):
            if f"--{option}" not in text:
                text = _EXAMPLE.sub(rf"\1 --{option} {_ADDRESS[option]}", text)
        for role, address in _ADDRESS.items():
            if address in text:
                text = text.replace(address, self.address(role))
        return text

    def python(self, text: str) -> subprocess.CompletedProcess[str]:
        """Runs a Python block; one that awaits at its top level gets a client, parameters and an event loop."""
        compile(text, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        try:
            compile(text, "block", "exec")
        except SyntaxError:
            text = _AROUND.format(textwrap.indent(text, " " * 8))
        return subprocess.run(
            [sys.executable, "-"],
            input=self.filled(text),
            capture_output=True,
            text=True,
            timeout=BOUND,
            cwd=self.directory,
            env=self._environment,
            check=False,
        )

    def close(self) -> None:
        """Ends what `launch` does not know of."""
        if "gateway" in self._services:
            self._services["gateway"].stop()


def _event(service, name):
    """A line of a service's log."""
    return next(entry for entry in service.entries() if entry["event"] == name)


def _cloned():
    """Files of a fresh clone, as paths from the root: those that git has, and those that somebody has not added yet."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, timeout=BOUND, check=True)
    return [name for name in done.stdout.split("\0") if name and os.path.lexists(ROOT / name)]
