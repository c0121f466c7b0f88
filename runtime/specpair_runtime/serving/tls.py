"""TLS and mutual TLS from files, which may be replaced while the service runs."""

from __future__ import annotations

from pathlib import Path

import grpc

from specpair.errors import InvalidRequestError
from specpair.pem import check_pair, check_roots
from specpair_runtime.serving.config import ServiceConfig
from specpair_runtime.serving.files import Reloaded, read_secret, read_setting

__all__ = ["server_credentials"]


def server_credentials(config: ServiceConfig) -> grpc.ServerCredentials | None:
    """What a port is opened with: None without TLS.

    Every new connection gets the certificate that lies in the files at that moment; connections that stand keep theirs,
    with their streams. With `tls_client_ca` a client without a certificate from there gets no connection at all.
    Raises InvalidRequestError naming the setting that is missing or whose file cannot be used.
    """
    if not (config.tls_cert or config.tls_key or config.tls_client_ca):
        return None
    for field in ("tls_cert", "tls_key"):
        if not getattr(config, field):
            raise InvalidRequestError("is required: TLS needs a certificate and its key", field=field)
    paths = [Path(path) for path in (config.tls_cert, config.tls_key, config.tls_client_ca) if path]
    files = Reloaded(paths, lambda: _certificates(config), "certificates")

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        certificates, changed = files.changed()
        return certificates if changed else None

    required = bool(config.tls_client_ca)
    return grpc.dynamic_ssl_server_credentials(files.get(), fetch, required)  # type: ignore[arg-type]  # None: no change


def _certificates(config: ServiceConfig) -> grpc.ServerCertificateConfiguration:
    chain, key = read_setting(config.tls_cert, "tls_cert"), read_secret(config.tls_key, "tls_key")
    roots = read_setting(config.tls_client_ca, "tls_client_ca") if config.tls_client_ca else None
    for field, pem in (("tls_cert", chain), ("tls_client_ca", roots)):
        try:
            if pem is not None:
                check_roots(pem)
        except ValueError as error:
            raise InvalidRequestError(f"{getattr(config, field)} {error}", field=field) from None
    try:
        check_pair(chain, key)
    except ValueError as error:
        raise InvalidRequestError(f"{config.tls_key} {error}", field="tls_key") from None
    return grpc.ssl_server_certificate_configuration([(key, chain)], roots)
