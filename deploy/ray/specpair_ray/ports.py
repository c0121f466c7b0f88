"""A port for every replica of a machine."""

from __future__ import annotations

import socket
from collections.abc import Iterable

__all__ = ["Claim"]


class Claim:
    """The first port of a machine that is free, and that no other replica there is about to use.

    A service needs seconds until it listens. Meanwhile the port is known to be taken by a name that the kernel knows as
    long as this process lives, and no longer: a replica that was killed leaves nothing behind. Linux only.
    """

    def __init__(self, host: str, ports: Iterable[int]) -> None:
        """Raises RuntimeError if none is free."""
        for port in ports:
            name = socket.socket(socket.AF_UNIX)
            try:
                name.bind(f"\0specpair-ray-{port}")
                if _is_free(host, port):
                    self.address, self._name = f"{_bracketed(host)}:{port}", name
                    return
            except OSError:
                pass
            name.close()
        raise RuntimeError(f"no port is free on {host}: there are more replicas on this machine than ports")

    def release(self) -> None:
        """Somebody else may have it."""
        self._name.close()


def _is_free(host: str, port: int) -> bool:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
