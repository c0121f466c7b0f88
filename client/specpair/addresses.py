"""What an address says about who can listen in."""

from __future__ import annotations

import ipaddress

__all__ = ["is_local"]


def is_local(address: str) -> bool:
    """Whether what is sent to or served on an address stays on this machine: loopback or a unix socket.

    Takes what gRPC takes, such as 127.0.0.1:50051, [::1]:50051, dns:///localhost:50051 or unix:/run/x.sock. A name
    other than localhost counts as remote, whatever it stands for.
    """
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    target = address.removeprefix("dns:///")
    if "/" in target:  # a name server or a resolver that decides
        return False
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        target = target.removeprefix(scheme)
    return all(_is_local_host(host) for host in target.split(","))


def _is_local_host(target: str) -> bool:
    host = target if target.count(":") != 1 else target.partition(":")[0]
    if target.startswith("["):
        host = target[1:].partition("]")[0]
    if host.lower() == "localhost":
        return True
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
