"""Connections that fail over certificates: what gRPC says about them, and what to do."""

from __future__ import annotations

from specpair.errors import SpecpairError, UnauthenticatedError, UnavailableError

__all__ = ["explained"]

_CLOSED = (
    "the connection was closed before it was up: the service may be gone, or it may want TLS where this side has none, "
    "or a client certificate (cert and key) from a CA that it knows and that has not expired"
)
# Only gRPC's own texts begin like this, for one server and for several: a stream that breaks later is another matter.
_UNCONNECTED = ("failed to connect", "connections to all backends failing")
# Parts of gRPC's text, the more special first, and what they mean.
_CAUSES: tuple[tuple[str, type[SpecpairError], str], ...] = (
    ("certificate has expired", UnauthenticatedError, "the service's certificate has expired: it needs a new one"),
    ("not yet valid", UnauthenticatedError, "the service's certificate is not valid yet: compare the clocks"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        UnauthenticatedError,
        "the service's certificate is not from a CA that this client trusts: give the right one as ca",
    ),
    (
        "Hostname Verification Check failed",
        UnauthenticatedError,
        "the service's certificate is for other names than this address: connect by a name that it carries, or give "
        "that as server_name",
    ),
    (
        "_ALERT_",
        UnauthenticatedError,
        "the service did not accept this client's certificate: give another cert and key",
    ),
    ("WRONG_VERSION_NUMBER", UnavailableError, "the service speaks no TLS at this address"),
    ("Socket closed", UnavailableError, _CLOSED),
    ("Connection reset by peer", UnavailableError, _CLOSED),
    ("Broken pipe", UnavailableError, _CLOSED),
)


def explained(error: SpecpairError) -> SpecpairError:
    """The same failure with its cause in words where a connection could not be made; other errors as they are.

    What a certificate is to blame for becomes an UnauthenticatedError: another try would end alike.
    """
    if not isinstance(error, UnavailableError) or not error.message.startswith(_UNCONNECTED):
        return error
    for part, kind, text in _CAUSES:
        if part in error.message:
            return kind(f"{text} ({error.message})", reason=error.reason, retry_after=error.retry_after)
    return error
