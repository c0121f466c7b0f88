"""Bearer tokens: who may call, denied by default."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from specpair.addresses import is_local
from specpair.errors import InvalidRequestError, UnauthenticatedError
from specpair_runtime.serving.config import ServiceConfig
from specpair_runtime.serving.files import Reloaded, read_secret
from specpair_runtime.serving.health import Health
from specpair_runtime.serving.identity import name_by_token

__all__ = ["Token", "TokenInterceptor", "accepted_tokens", "owner", "read_tokens", "token_interceptors"]

# Probes have no token, and what they learn is whether the service serves.
_OPEN = f"/{Health.SERVICE}/"

_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
# RFC 6750's form of a token, and long enough that nobody finds it by trying.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,512}=*")
_DIGEST = re.compile(r"[0-9a-f]{64}")

# Seconds for the first message of a call that is denied.
_FIRST_WITHIN = 0.1

_log = structlog.stdlib.get_logger("specpair")


@dataclass(frozen=True)
class Token:
    """One accepted token: whose it is, and its SHA-256. The token itself is kept nowhere."""

    name: str
    digest: bytes


def token_interceptors(config: ServiceConfig) -> list[grpc.aio.ServerInterceptor]:
    """What stands in front of every handler: nothing where no tokens are asked for.

    Raises InvalidRequestError naming `auth_tokens` for a file that cannot be used, and where tokens would come in plain
    text from other machines.
    """
    if not config.auth_tokens:
        return []
    if not (config.tls_cert or config.insecure_tokens or is_local(config.listen)):
        raise InvalidRequestError(
            f"tokens would come in plain text to {config.listen}: give --tls-cert and --tls-key, listen on a loopback "
            "address, or give --insecure-tokens where something in front ends TLS",
            field="auth_tokens",
        )
    return [TokenInterceptor(accepted_tokens(config.auth_tokens, "auth_tokens"))]


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call through to its handler only with a known token as `authorization: Bearer TOKEN`; health is open.

    Everything else ends with UNAUTHENTICATED and one text for every cause, methods that do not exist included. The
    bytes of at most one message are taken off the wire, and nobody looks into them.
    """

    def __init__(self, tokens: Callable[[], tuple[Token, ...]]) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if handler_call_details.method.startswith(_OPEN):
            return await continuation(handler_call_details)
        name = self._name(handler_call_details)
        if name is None:
            return _DENIED
        name_by_token(name)
        return await continuation(handler_call_details)

    def _name(self, details: grpc.HandlerCallDetails) -> str | None:
        """Whose token a call carries, None for no or no known token."""
        given = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str):
            return None
        return owner(given[0], self._tokens())


async def _deny(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
    # A client that is still writing when its call ends is told INTERNAL by its own gRPC, and not why.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FIRST_WITHIN):
            await anext(aiter(requests), None)
    raise UnauthenticatedError("a valid bearer token is required")


# Whatever the client takes it for: a handler with a stream of requests, and without a decoder, has nothing parsed.
_DENIED: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(_deny)


def owner(authorization: str, tokens: Sequence[Token]) -> str | None:
    """Whose token the value of an `authorization` header carries, None for no or no known bearer token."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer":
        return None
    # Digests are equally long and every entry is compared, so that the time tells nothing of the tokens.
    digest = hashlib.sha256(token.encode()).digest()
    matches = [known.name for known in tokens if hmac.compare_digest(known.digest, digest)]
    return matches[0] if matches else None


def accepted_tokens(path: str, field: str) -> Callable[[], tuple[Token, ...]]:
    """The tokens of a file as it is now, see `read_tokens`.

    Raises InvalidRequestError naming the setting for a file that cannot be used; one that cannot be used later on
    changes nothing.
    """
    tokens = Reloaded([Path(path)], lambda: _read(path, field), "tokens")
    if not tokens.get():
        raise InvalidRequestError(f"{path} has no token", field=field)
    return tokens.get


def read_tokens(text: str) -> tuple[Token, ...]:
    """The tokens of a file: `NAME:TOKEN` or `NAME:sha256:HEX` in each line; lines that begin with # say nothing.

    Two lines may have one name, as while a token is replaced. Raises ValueError that names the line, not its content.
    """
    tokens = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (entry := line.strip()) or entry.startswith("#"):
            continue
        name, _, secret = entry.partition(":")
        if not _NAME.fullmatch(name) or not secret:
            raise ValueError(f"line {number} is neither NAME:TOKEN nor NAME:sha256:HEX")
        if secret.startswith("sha256:"):
            digest = secret.removeprefix("sha256:").lower()
            if not _DIGEST.fullmatch(digest):
                raise ValueError(f"line {number} has no SHA-256 of 64 hexadecimal digits")
            tokens.append(Token(name, bytes.fromhex(digest)))
        elif _TOKEN.fullmatch(secret):
            tokens.append(Token(name, hashlib.sha256(secret.encode()).digest()))
        else:
            raise ValueError(f"line {number} has a token that is not 16 to 512 letters, digits or ._~+/-")
    return tuple(tokens)


def _read(path: str, field: str) -> tuple[Token, ...]:
    try:
        tokens = read_tokens(read_secret(path, field).decode())
    except ValueError as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise InvalidRequestError(f"{path} {reason}", field=field) from None
    if not tokens:
        _log.warning(f"{field}: {path} has no token: every call is denied")
    return tokens
