"""Who is calling: one name per caller, for fairness and limits.

Names of different kinds never meet in one server: where tokens are asked for every caller has one, and where client
certificates are asked for every caller has one.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import grpc

__all__ = ["current_identity", "identify", "name_by_token"]

# grpc.aio runs every call in a task of its own, interceptors included, so nothing has to be unbound.
_token_name: ContextVar[str] = ContextVar("token_name", default="")
_identity: ContextVar[str] = ContextVar("identity", default="")


def current_identity() -> str:
    """The caller of the current call: the name of its token, else of its certificate, else its address without port.

    "" outside of a call. Not a secret: it may stand in logs.
    """
    return _identity.get()


def name_by_token(name: str) -> None:
    """Notes whose token the current call carries, before its handler runs."""
    _token_name.set(name)


def identify(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Sets the identity of the current call for `current_identity`; returns the name that the caller has proven, or "".

    To be called before the handler.
    """
    proven = _token_name.get() or _certified(context)
    _identity.set(proven or _address(context.peer()))
    return proven


def _certified(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The first alternative name of a verified client certificate, else its common name; "" without one."""
    for name in context.peer_identities() or ():
        return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    return ""


def _address(peer: str) -> str:
    """A peer such as ipv4:127.0.0.1:50000 without the port; unix sockets have none."""
    return peer if peer.startswith("unix") else peer.rpartition(":")[0]
