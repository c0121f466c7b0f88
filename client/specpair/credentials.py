"""How a client proves who it is, and how it knows whom it talks to."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from specpair.addresses import is_local
from specpair.errors import InvalidRequestError, UnauthenticatedError
from specpair.pem import check_pair, check_roots

__all__ = ["Access", "Credentials"]

# What a header may carry as a token.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")

_log = logging.getLogger("specpair")


@dataclass(frozen=True)
class Credentials:
    """TLS, mutual TLS and a bearer token for a service; without any, plain text.

    `ca`, `cert` and `key` are the path of a PEM file, or its bytes. They are read when a client is made.
    """

    ca: str | Path | bytes | None = None
    """Certificates of the CAs to trust in place of those that gRPC brings along. Turns TLS on."""
    cert: str | Path | bytes | None = None
    """This client's certificate chain, for a service that asks for one. Needs `key`, and turns TLS on."""
    key: str | Path | bytes | None = field(default=None, repr=False)
    """The private key of `cert`, without a password."""
    token: str | Path | Callable[[], str] | None = field(default=None, repr=False)
    """The bearer token: itself, as a str; the Path of a file that holds it and is read again when it has changed; or a
    function that returns it at once, asked before each call."""
    server_name: str | None = None
    """The name that the service's certificate has to carry, where it is not the address's. Turns TLS on."""
    tls: bool | None = None
    """Whether to use TLS. None, the default: if anything above asks for it."""
    insecure_token: bool = False
    """Whether the token may go in plain text to another machine, where everybody on the way can read it."""

    @property
    def secure(self) -> bool:
        """Whether connections use TLS."""
        return self._asks_for_tls if self.tls is None else self.tls

    @property
    def _asks_for_tls(self) -> bool:
        return any(given is not None for given in (self.ca, self.cert, self.key, self.server_name))

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            missing = "cert" if self.cert is None else "key"
            raise InvalidRequestError("is required: cert and key go together", field=f"credentials.{missing}")
        if self.tls is False and self._asks_for_tls:
            raise InvalidRequestError("must not be off with ca, cert, key or server_name", field="credentials.tls")


class Access:
    """Credentials at work for one address.

    Raises InvalidRequestError for files that cannot be used, for a token that no header can carry, and for one that
    would leave this machine in plain text unasked.
    """

    def __init__(self, address: str, credentials: Credentials | None) -> None:
        self._credentials = credentials = credentials or Credentials()
        self._address = address
        self._channel_credentials = _channel_credentials(credentials) if credentials.secure else None
        self._token = _token_source(credentials.token)
        local = is_local(address)
        if self._token is not None and not (credentials.secure or local or credentials.insecure_token):
            raise InvalidRequestError(
                f"would go to {address} in plain text: give a ca or tls=True, or insecure_token=True",
                field="credentials.token",
            )
        # A proxy named in the environment is another machine.
        self._keeps_local = self._token is not None and local and not credentials.secure

    def channel(self, options: Sequence[tuple[str, Any]]) -> aio.Channel:
        """A channel to the address; made on the event loop that uses it."""
        if self._channel_credentials is None:
            direct = [("grpc.enable_http_proxy", 0)] if self._keeps_local else []
            return aio.insecure_channel(self._address, options=[*options, *direct])
        name = self._credentials.server_name
        named = [("grpc.ssl_target_name_override", name)] if name is not None else []
        return aio.secure_channel(self._address, self._channel_credentials, options=[*options, *named])

    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """What a call carries. Raises UnauthenticatedError if there is no token to be had."""
        if self._token is None:
            return None
        return (("authorization", f"Bearer {self._token()}"),)


class _TokenFile:
    """A token in a file, read again when that has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._now()
        self._token = self._read()

    def __call__(self) -> str:
        if (stamp := self._now()) != self._stamp:
            self._stamp = stamp
            try:
                self._token = self._read()
            except InvalidRequestError as error:
                # Perhaps it is being replaced; if not, the service will say so.
                _log.warning("the token read before stays: %s", error)
        return self._token

    def _read(self) -> str:
        try:
            return _checked(self._path.read_text("utf-8").strip())
        except OSError as error:
            reason = f"cannot read {self._path}: {error.strerror}"
            raise InvalidRequestError(reason, field="credentials.token") from None
        except ValueError:
            raise InvalidRequestError(f"{self._path} holds no token", field="credentials.token") from None

    def _now(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_size, found.st_ino)


def _token_source(token: str | Path | Callable[[], str] | None) -> Callable[[], str] | None:
    if token is None:
        return None
    if isinstance(token, Path):
        return _TokenFile(token)
    if isinstance(token, str):
        try:
            fixed = _checked(token)
        except ValueError as error:
            raise InvalidRequestError(str(error), field="credentials.token") from None
        return lambda: fixed
    given = token

    def ask() -> str:
        try:
            return _checked(given())
        except Exception as error:
            raise UnauthenticatedError(f"the token function failed: {type(error).__name__}: {error}") from error

    return ask


def _checked(token: str) -> str:
    """Raises ValueError, which does not show it, for a token that is none."""
    if not _TOKEN.fullmatch(token):
        raise ValueError("must be letters, digits and ._~+/- with = at the end only")
    return token


def _channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    ca, cert, key = (_pem(getattr(credentials, name), name) for name in ("ca", "cert", "key"))
    for name, pem in (("ca", ca), ("cert", cert)):
        try:
            if pem is not None:
                check_roots(pem)
        except ValueError as error:
            raise InvalidRequestError(str(error), field=f"credentials.{name}") from None
    try:
        if cert is not None and key is not None:
            check_pair(cert, key)
    except ValueError as error:
        raise InvalidRequestError(str(error), field="credentials.key") from None
    return grpc.ssl_channel_credentials(ca, key, cert)


def _pem(given: str | Path | bytes | None, name: str) -> bytes | None:
    if given is None or isinstance(given, bytes):
        return given
    if "\n" in str(given):  # which must not get into a message: it may be a key
        raise InvalidRequestError("a str is a path: give PEM text as bytes", field=f"credentials.{name}")
    try:
        return Path(given).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"cannot read {given}: {error.strerror}", field=f"credentials.{name}") from None
