"""The load balancers of deploy/ as processes of their own, on loopback, in front of any two addresses."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from ..e2e.processes import wait_for
from ..proxy import bound

DEPLOY = Path(__file__).parents[2] / "deploy"
NAMES = ("haproxy", "nginx")

# Debian keeps both where only root looks.
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"

# Bounds that stand for "does not hang", in seconds.
_START = 20
_STOP = 10


def free_address():
    """A loopback address on which nothing listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{reserved.getsockname()[1]}"


class Proxy:
    """HAProxy or nginx with the configuration of deploy/, in front of two targets, and of two drafts if they are given.

    It listens on `address` for the targets and on `draft_address` for the drafts.

    `edit` takes the configuration's text, in which addresses stand already, and returns the one to use.
    """

    def __init__(self, name, place, targets, drafts=None, edit=lambda text: text):
        """`name` is one of NAMES, `place` a directory of its own. Skips the test when the program is not installed."""
        program = shutil.which(name, path=_PATH)
        if program is None:
            pytest.skip(f"{name} is not installed")
        self.name = name
        # Bound and never listening, by which nobody else gets these ports until the program has them, nor afterwards.
        self._places = [bound(0) for _ in range(4)]
        self.address, self.draft_address, *nobody = (f"127.0.0.1:{place.getsockname()[1]}" for place in self._places)
        self.log = place / "log"
        configuration = place / f"{name}.cfg"
        configuration.write_text(edit(self._text(targets, drafts or nobody)))
        command = [program, *self._arguments(place, configuration)]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env={}
            )
        wait_for(self._listens, _START, f"{name} listening")

    @property
    def text(self):
        """Everything that the process wrote."""
        return self.log.read_text(errors="replace")

    def stop(self):
        """Ends the process; streams that it carries end with it."""
        self.process.terminate()
        try:
            self.process.wait(_STOP)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            for place in self._places:
                place.close()

    def _text(self, targets, drafts):
        """The configuration with these addresses in place of its own, each of which stands there once."""
        if self.name == "haproxy":
            text = (DEPLOY / "haproxy/haproxy.cfg").read_text()
            variables = ("LISTEN", "TARGET_1", "TARGET_2", "DRAFT_LISTEN", "DRAFT_1", "DRAFT_2")
            written = [re.search(rf'"\$\{{SPECPAIR_{variable}-[^}}]*\}}"', text)[0] for variable in variables]
        else:
            text = (DEPLOY / "nginx/nginx.conf").read_text()
            written = [f"127.0.0.1:{port}" for port in (50050, 50051, 50061, 50060, 50052, 50062)]
        for there, used in zip(written, (self.address, *targets, self.draft_address, *drafts), strict=True):
            assert text.count(there) == 1
            text = text.replace(there, used)
        return text

    def _arguments(self, place, configuration):
        if self.name == "haproxy":
            # Without a master process, so that the signal ends what it is sent to.
            return ["-db", "-f", configuration]
        return ["-p", place, "-c", configuration, "-e", "stderr", "-g", "daemon off; pid nginx.pid;"]

    def _listens(self):
        assert self.process.poll() is None, f"{self.name} ended:\n{self.text}"
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return False
        return True
