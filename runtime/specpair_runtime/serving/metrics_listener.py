"""The listener that serves a registry of metrics over HTTP, for Prometheus."""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
from functools import partial
from typing import Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

from specpair.errors import UnavailableError

__all__ = ["MetricsListener"]

# Seconds that a client may take to ask.
_PATIENCE = 10.0
# Seconds after which a listener that is closed looks up.
_POLL = 0.2

_log = structlog.stdlib.get_logger("specpair")


class MetricsListener:
    """Serves a registry over HTTP at HOST:PORT, in threads of its own, within a `with` block; "" serves nothing."""

    def __init__(self, listen: str, registry: CollectorRegistry | None) -> None:
        """Takes the address. Raises UnavailableError naming `metrics_listen` when it cannot be used."""
        self._server: WSGIServer | None = None
        self.address = ""
        """HOST:PORT with the port in use; "" where nothing is served."""
        if not listen or registry is None:
            return
        host, _, port = listen.rpartition(":")
        kind = _Server6 if ":" in host else _Server
        try:
            self._server = make_server(host.strip("[]"), int(port), make_wsgi_app(registry), kind, _Handler)
        except OSError as error:
            reason = f"cannot listen on {listen}: {error.strerror or error}"
            raise UnavailableError(reason, field="metrics_listen") from None
        self.address = f"{host}:{self._server.server_port}"

    def __enter__(self) -> Self:
        if self._server is not None:
            serve = partial(self._server.serve_forever, poll_interval=_POLL)
            threading.Thread(target=serve, name="metrics", daemon=True).start()
            _log.info("serving metrics", address=self.address)
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # The library's own looks the host's name up, which may take as long as the name service likes.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        """Logs what the library would print between the log's lines. Clients that say nothing or go away, as probes of
        the port do, are no news.
        """
        if not isinstance(sys.exception(), OSError):
            _log.exception("a request for metrics failed")


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a scrape every few seconds is no news."""
