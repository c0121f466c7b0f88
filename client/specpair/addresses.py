"""What an address says: who can listen in, and how many servers it stands for."""

from __future__ import annotations

import ipaddress

__all__ = ["is_local", "names_several", "separate"]

# Schemes whose addresses are lists of literal ones.
_LISTS = ("ipv4:", "ipv6:")


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


def names_several(address: str) -> bool:
    """Whether an address says that it may stand for several servers, among which calls are to be spread.

    That is a name to be looked up as such, dns:///target.example:50051, and a list, ipv4:10.0.0.1:50051,10.0.0.2:50051.
    Without a scheme a name is one server, and gRPC takes the first of its addresses that answers.
    """
    return address.startswith("dns:") or (address.startswith(_LISTS) and "," in address)


def separate(addresses: str) -> list[str]:
    """The addresses in a text with commas between them; what follows ipv4: or ipv6: up to the next name is one list."""
    found: list[str] = []
    for address in (part.strip() for part in addresses.split(",")):
        if found and found[-1].startswith(_LISTS) and _is_literal(address):
            found[-1] += f",{address}"
        else:
            found.append(address)
    return found


def _is_literal(address: str) -> bool:
    """Whether it is IP:PORT, as one in a list."""
    host, _, port = address.rpartition(":")
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return port.isdecimal()


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
