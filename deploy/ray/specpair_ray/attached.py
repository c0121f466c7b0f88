"""`python -m specpair_ray.attached PARENT MODULE FLAG ...`: a module that runs no longer than the process PARENT.

A replica that is killed cannot end its service, which would keep its port and the memory of its GPU. The kernel can.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

__all__ = ["command"]

_PR_SET_PDEATHSIG = 1


def command(module: str, *flags: str) -> Sequence[str]:
    """What a process starts to have a module run as its own. The kernel goes by the thread that starts it."""
    return [sys.executable, "-m", __name__, str(os.getpid()), module, *flags]


def main() -> None:
    """Becomes the module."""
    parent, module, *flags = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != int(parent):
        sys.exit("the parent has ended already")
    os.execv(sys.executable, [sys.executable, "-m", module, *flags])


if __name__ == "__main__":
    main()
