"""Docker and buildah, as far as deploy/build_images.py uses them: building an image, and running its parts hardened.

Every container of a check shares one network namespace that has a loopback and nothing else, has a read-only root, no
capabilities and a tmpfs at /tmp, and may write to the cache of its name alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

CACHE = "/var/cache/specpair"


def output(*command: str, check: bool = True) -> str:
    """What a command prints. Raises CalledProcessError if it fails; what it says of that goes to stderr."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=check).stdout.strip()


class Running(Protocol):
    """A service that was started."""

    def health(self) -> int:
        """Exit status of the image's health command beside it."""

    def alive(self) -> bool:
        """Whether its process runs."""

    def stop(self) -> int:
        """Sends SIGTERM and returns its exit status."""

    def log(self) -> str:
        """What it wrote to stderr and stdout."""


class Engine(Protocol):
    """What builds images and runs them."""

    def build(self, tag: str, arguments: Sequence[str]) -> None:
        """Builds deploy/Dockerfile, from the current directory, and names the image."""

    def config(self, tag: str) -> dict[str, Any]:
        """The image's User, Env, Entrypoint, Cmd and Healthcheck."""

    def size(self, tag: str) -> int:
        """The image's size in bytes."""

    def run(self, tag: str, command: Sequence[str], cache: str) -> str:
        """What a command prints in a container of the image. Raises CalledProcessError if it fails."""

    def start(self, tag: str, settings: Mapping[str, str], cache: str) -> Running:
        """Starts what the image starts, with environment variables over its own."""

    def close(self) -> None:
        """Removes containers and caches. Images stay."""


class Docker:
    """Docker 23 or newer with BuildKit."""

    def __init__(self) -> None:
        self._prefix = f"specpair-check-{os.getpid()}"
        self._containers: list[str] = []
        self._caches: set[str] = set()
        self._network = "none"

    def build(self, tag: str, arguments: Sequence[str]) -> None:
        # The host's network, as buildah has it: indexes may be reachable from there alone.
        subprocess.run(["docker", "build", "--network=host", "-t", tag, *arguments], check=True)

    def config(self, tag: str) -> dict[str, Any]:
        return dict(json.loads(output("docker", "image", "inspect", tag))[0]["Config"])

    def size(self, tag: str) -> int:
        return int(json.loads(output("docker", "image", "inspect", tag))[0]["Size"])

    def run(self, tag: str, command: Sequence[str], cache: str) -> str:
        hardened = self._hardened(cache)
        return output("docker", "run", "--rm", *hardened, f"--entrypoint={command[0]}", tag, *command[1:])

    def start(self, tag: str, settings: Mapping[str, str], cache: str) -> Running:
        if self._network == "none":
            # Of a container that does nothing else: a network ends with the container that has it.
            holder = self._detached("--network=none", "--entrypoint=sleep", tag, "infinity")
            self._network = f"container:{holder}"
        given = [f"--env={variable}={value}" for variable, value in settings.items()]
        name = self._detached(*self._hardened(cache), *given, tag)
        return _DockerService(name, self.config(tag)["Healthcheck"]["Test"][1:])

    def close(self) -> None:
        if self._containers:
            output("docker", "rm", "--force", *self._containers)
        if self._caches:
            output("docker", "volume", "rm", "--force", *self._caches)

    def _detached(self, *arguments: str) -> str:
        name = f"{self._prefix}-{len(self._containers)}"
        self._containers.append(name)  # one that cannot start is there all the same
        output("docker", "run", "--detach", f"--name={name}", *arguments)
        return name

    def _hardened(self, cache: str) -> list[str]:
        volume = f"{self._prefix}-{cache}"
        self._caches.add(volume)
        # Like docker-compose.yml.
        return [
            "--init",
            "--read-only",
            "--tmpfs=/tmp:mode=1777",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges:true",
            f"--network={self._network}",
            f"--volume={volume}:{CACHE}",
        ]


class _DockerService:
    def __init__(self, name: str, health: Sequence[str]) -> None:
        self._name = name
        self._health = health

    def health(self) -> int:
        command = ["docker", "exec", self._name, *self._health]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode

    def alive(self) -> bool:
        return output("docker", "inspect", "--format={{.State.Running}}", self._name) == "true"

    def stop(self) -> int:
        output("docker", "stop", "--time=60", self._name)
        return int(output("docker", "inspect", "--format={{.State.ExitCode}}", self._name))

    def log(self) -> str:
        done = subprocess.run(
            ["docker", "logs", self._name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        return done.stdout


class Buildah:
    """buildah as root, with namespaces and a chroot of its own for what it cannot do: a read-only root."""

    # Mounts, then the image's user without any capability. Arguments: root, cache, uid, gid, command.
    _ENTER = """set -e
root="$1" cache="$2" uid="$3" gid="$4"; shift 4
mount --bind "$root" "$root"
mount --bind "$cache" "$root/var/cache/specpair"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount --rbind /dev "$root/dev"; mount --bind /proc "$root/proc"; mount --bind /sys "$root/sys"
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs --bounding-set=-all \
    --inh-caps=-all "$@"
"""

    def __init__(self) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="specpair-check-"))
        self._place.chmod(0o755)
        self._containers: dict[str, tuple[str, str]] = {}
        self._started: list[_Process] = []
        self._network = subprocess.Popen(["unshare", "--net", "sh", "-c", "ip link set lo up && exec sleep infinity"])
        time.sleep(1)

    def build(self, tag: str, arguments: Sequence[str]) -> None:
        # HEALTHCHECK exists in Docker's format alone; layers are kept for the next target.
        subprocess.run(["buildah", "bud", "--format=docker", "--layers", "-t", tag, *arguments], check=True)

    def config(self, tag: str) -> dict[str, Any]:
        return dict(json.loads(output("buildah", "inspect", "--type=image", tag))["Docker"]["config"])

    def size(self, tag: str) -> int:
        _, root = self._root(tag)
        return int(output("du", "-sbx", root).split()[0])

    def run(self, tag: str, command: Sequence[str], cache: str) -> str:
        return output(*self._enter(tag, command, {}, cache))

    def start(self, tag: str, settings: Mapping[str, str], cache: str) -> Running:
        log = self._place / f"{len(self._started)}.log"
        config = self.config(tag)
        with log.open("w") as file:
            command = self._enter(tag, [*config["Entrypoint"], *(config.get("Cmd") or [])], settings, cache)
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        health = self._enter(tag, config["Healthcheck"]["Test"][1:], settings, cache)
        self._started.append(_Process(process, health, log))
        return self._started[-1]

    def close(self) -> None:
        for service in self._started:
            service.stop()
        self._network.kill()
        self._network.wait()
        for container, _ in self._containers.values():
            output("buildah", "rm", container)
        shutil.rmtree(self._place)

    def _root(self, tag: str) -> tuple[str, str]:
        if tag not in self._containers:
            container = output("buildah", "from", "--pull-never", tag)
            self._containers[tag] = container, output("buildah", "mount", container)
        return self._containers[tag]

    def _enter(self, tag: str, command: Sequence[str], settings: Mapping[str, str], cache: str) -> list[str]:
        _, root = self._root(tag)
        config = self.config(tag)
        uid, gid = config["User"].split(":")
        place = self._place / cache
        if not place.exists():
            # As the image has it, which a volume takes its owner and mode from.
            place.mkdir(mode=0o700)
            os.chown(place, int(uid), int(gid))
        namespaces = ["nsenter", f"--net=/proc/{self._network.pid}/ns/net", "unshare", "--mount", "--ipc", "--uts"]
        environment = [*config["Env"], f"HOME={CACHE}", *(f"{name}={value}" for name, value in settings.items())]
        cleared = ["env", "-i", *environment, *command]
        return [*namespaces, "sh", "-c", self._ENTER, "enter", root, str(place), uid, gid, *cleared]


class _Process:
    def __init__(self, process: subprocess.Popen[bytes], health: Sequence[str], log: Path) -> None:
        self._process = process
        self._health = health
        self._log = log

    def health(self) -> int:
        done = subprocess.run(self._health, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        return done.returncode

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> int:
        # Everything on the way to the service replaces itself, so that this is the service's own process.
        self._process.terminate()
        return self._process.wait(60)

    def log(self) -> str:
        return self._log.read_text()
