"""Whether certificates and keys can be used, before gRPC fails without a reason that a caller could read."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator

__all__ = ["check_pair", "check_roots"]


def check_roots(pem: bytes) -> None:
    """Raises ValueError unless `pem` holds at least one certificate."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ValueError("holds no PEM certificate") from None


def check_pair(certificate: bytes, key: bytes) -> None:
    """Raises ValueError unless the key, in PEM without a password, belongs to the first certificate of a PEM chain."""
    check_roots(certificate)
    if not hasattr(os, "memfd_create"):  # gRPC checks it too, but says so on stderr alone
        return
    with _in_memory(certificate) as chain, _in_memory(key) as private:
        try:
            # Python takes files alone. These lie in memory, so that no key is written to a disk.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, private, _no_password)
        except (ssl.SSLError, ValueError) as error:
            if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
                raise ValueError("does not belong to the certificate") from None
            raise ValueError("is no PEM private key without a password") from None


def _no_password() -> bytes:
    return b""


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """The path of a file that lies in no directory, and whose content is gone when the block ends."""
    descriptor = os.memfd_create("pem")
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        file.write(content)
        yield f"/proc/self/fd/{descriptor}"
