"""What a benchmark's JSON says besides figures: when, by which command, with which versions, on what machine."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["OtherWork", "command", "machine", "pin", "processor", "relative", "versions", "write_report"]

_PACKAGES = ("specpair", "torch", "transformers", "grpcio")


def pin(cores: int | None) -> list[int]:
    """Keeps this process, and those it starts from now on, on its first `cores` cores; None keeps what is.

    Returns the cores, empty where the system cannot tell.
    """
    if not hasattr(os, "sched_setaffinity"):
        return []
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    # Libraries have started threads by now; a thread's cores are its own.
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), chosen)
    return chosen


def command(arguments: Sequence[str]) -> list[str]:
    """The command line of this process, with paths relative to the working directory."""
    return ["python", *(relative(argument) for argument in arguments)]


def relative(argument: str) -> str:
    """A path below the working directory relative to it, the name alone of another one; other arguments as they are."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of packages."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def machine(cores: Sequence[int], device: str = "cpu") -> dict[str, object]:
    """The machine, as far as it matters for speed."""
    facts: dict[str, object] = {
        "processor": processor(Path("/proc/cpuinfo")),
        "cores": os.cpu_count(),
        "cores_used": len(cores) or os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def processor(cpuinfo: Path) -> str:
    """The processor's model name."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class OtherWork:
    """What else the machine does from now on: the noise that the figures stand in."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Cores that other processes kept busy on average; None where the system does not tell.

        Processes that this one has started must have ended: the system counts their time as its own only then.
        """
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        elsewhere = busy - self._busy - (_own_seconds() - self._own)
        return max(0.0, round(elsewhere / (time.perf_counter() - self._began), 2))


def write_report(path: Path, figures: Mapping[str, object], facts: Mapping[str, object]) -> None:
    """Writes date, command and versions, then `facts`, then `figures` as readable JSON."""
    report = {
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "command": command(sys.argv),
        "versions": versions(),
        **facts,
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _busy_seconds() -> float | None:
    """Seconds that all cores together have worked since the machine started."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *more = (int(field) for field in fields)
    # Behind `more`'s first three, interrupts and what a host took away, stand guests, which are in `user` already.
    return (user + nice + system + sum(more[:3])) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
