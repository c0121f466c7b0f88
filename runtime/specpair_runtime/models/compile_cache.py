"""Where compiled steps are kept, so that the next start does not compile them again.

inductor and AOTAutograd keep what they make below one directory, and triton does so with its kernels. Their keys hold
the graph with its shapes, the options and the version of torch. What this module adds is where: a directory of the
user that survives a restart of the machine and that nobody else can write to, and in it one for each torch and
processor, so that a home directory may be shared between machines.
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
from pathlib import Path

import structlog
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from specpair.errors import ModelLoadError

__all__ = ["keep_compiled", "machine_key"]

_log = structlog.get_logger("specpair")
# What inductor reads, whenever it looks for its directory.
_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled(choice: str) -> Path | None:
    """Keeps what this process compiles from now on, and uses what is there; returns the directory.

    `choice` is a directory, "auto" or "off", which uses nothing that was kept and returns None. auto follows
    TORCHINDUCTOR_CACHE_DIR where that is set; else it is `specpair/compiled` below XDG_CACHE_HOME or ~/.cache. Where
    that cannot be made torch decides, and None is returned. Several processes may share a directory, also while they
    start. Raises ModelLoadError naming `compile_cache` for one that cannot be used, or that others may write to:
    compiled code is run as it is.
    """
    torch.compiler.config.force_disable_caches = choice == "off"
    if choice == "off":
        return None
    set_before = os.environ.get(_INDUCTOR)
    # torch writes its own default into the variable as soon as anything asks it for the directory.
    if choice == "auto" and set_before and set_before != str(Path(default_cache_dir()).absolute()):
        return Path(set_before)
    try:
        place = _made(_default() if choice == "auto" else Path(choice).expanduser().absolute())
    except (OSError, RuntimeError) as error:
        if choice == "auto":
            # A service without a home, or with one that is read-only, starts all the same.
            _log.warning("compile_cache_unavailable", reason=str(error))
            return None
        raise ModelLoadError(f"cannot use {choice}: {error}", field="compile_cache") from error
    _check_private(place)
    os.environ[_INDUCTOR] = str(place)
    return place


def machine_key() -> str:
    """A name for this torch on this processor and GPU."""
    facts = [torch.__config__.show(), platform.machine(), torch.backends.cpu.get_cpu_capability(), _cpu_features()]
    if torch.cuda.is_available():
        facts += [torch.cuda.get_device_name(0), str(torch.cuda.get_device_capability(0))]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return f"torch-{torch.__version__}-{digest[:12]}"


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _made(directory: Path) -> Path:
    place = directory / machine_key()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    place.mkdir(mode=0o700, exist_ok=True)
    return place


def _default() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "specpair" / "compiled"


def _check_private(path: Path) -> None:
    status = path.stat()
    foreign = hasattr(os, "getuid") and status.st_uid != os.getuid()
    if foreign or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ModelLoadError(f"others may write to {path}, whose contents are run", field="compile_cache")
