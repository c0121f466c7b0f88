"""Files that are read again when they have changed, so that secrets are replaced without a restart."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from specpair.errors import InvalidRequestError

__all__ = ["Reloaded", "read_secret", "read_setting"]

T = TypeVar("T")

_log = structlog.stdlib.get_logger("specpair")

_READABLE_BY_ALL = 0o004
_Stamp = tuple[tuple[int, int, int], ...]


class Reloaded(Generic[T]):
    """What `read` makes of some files, made again after any of them has changed.

    Files that cannot be used are logged, once per change, and what was read before stays in force. May be asked by any
    thread; costs a stat of each file.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], what: str) -> None:
        """Reads for the first time. Raises InvalidRequestError as `read` does."""
        self._paths = paths
        self._read = read
        self._what = what
        self._lock = threading.Lock()
        self._stamp = self._now()
        self._value = read()

    def get(self) -> T:
        """What holds now."""
        return self.changed()[0]

    def changed(self) -> tuple[T, bool]:
        """What holds now, and whether this call has found it to be new."""
        with self._lock:
            stamp = self._now()
            if stamp == self._stamp:
                return self._value, False
            # Taken before the files are read: what changes meanwhile is read by the next call.
            self._stamp = stamp
            try:
                self._value = self._read()
            except InvalidRequestError as error:
                _log.error(f"the new {self._what} cannot be used, the old ones stay: {error}")
                return self._value, False
            _log.info(f"{self._what} loaded again")
            return self._value, True

    def _now(self) -> _Stamp:
        return tuple(map(_stamp, self._paths))


def read_setting(path: str, field: str) -> bytes:
    """A file that a setting names. Raises InvalidRequestError naming the setting."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"cannot read {path}: {error.strerror}", field=field) from None


def read_secret(path: str, field: str) -> bytes:
    """The same for a file that others should not read; logs a warning where everybody may."""
    content = read_setting(path, field)
    with contextlib.suppress(OSError):  # gone meanwhile
        if Path(path).stat().st_mode & _READABLE_BY_ALL:
            _log.warning(f"{field}: {path} is readable by every user of this machine; chmod 600 mends it")
    return content


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    # A file that was replaced by another one is another inode, even within the clock's resolution.
    return (found.st_mtime_ns, found.st_size, found.st_ino)
