"""`python -m specpair_gateway`, `specpair-gateway`: runs the gateway."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

import structlog
import uvicorn
from prometheus_client import CollectorRegistry

from specpair import InvalidRequestError, SpeculativeClient, UnavailableError
from specpair.addresses import is_local
from specpair.client import ClientOptions
from specpair.metrics import ClientMetrics
from specpair_gateway.app import create_app
from specpair_gateway.config import GatewayConfig
from specpair_gateway.metrics import RequestMetrics
from specpair_runtime.serving import configure_logs
from specpair_runtime.serving.metrics import describe_process
from specpair_runtime.serving.metrics_listener import MetricsListener
from specpair_runtime.serving.tracing import configure_tracing

__all__ = ["main", "serve"]

_log = structlog.stdlib.get_logger("specpair")


def main() -> None:
    """Runs the gateway until it is told to stop: exit status 0 then, another one if it cannot begin."""
    config = GatewayConfig.parse(prog="specpair-gateway")
    configure_logs(config.log_format, config.log_level)
    sys.exit(asyncio.run(serve(config)))


async def serve(config: GatewayConfig) -> int:
    """Serves until a signal comes, and returns the exit status of the process."""
    registry = CollectorRegistry()
    describe_process(registry, service="gateway")
    # A client belongs to the event loop that it is made on.
    try:
        listener = MetricsListener(config.metrics_listen, registry)
        options: ClientOptions = {**config.client_options, "metrics": ClientMetrics(registry)}
        # First, for the client traces with what is set up then.
        tracing = configure_tracing(config.program, wanted=config.otel)
        client = SpeculativeClient(config.target, config.draft, **options)
        app = create_app(config, client, RequestMetrics(registry), tracing)
    except (InvalidRequestError, UnavailableError) as error:
        _log.error(f"failed: {error}")
        return 1
    if not (config.api_keys or is_local(config.listen)):
        _log.warning("no API keys: everybody who reaches the address may use the model", address=config.listen)
    path = config.listen.removeprefix("unix:") if config.listen.startswith("unix:") else None
    host, _, port = config.listen.rpartition(":")
    settings = uvicorn.Config(
        app,
        host=host.strip("[]"),
        port=0 if path else int(port),
        uds=path,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        ssl_certfile=config.tls_cert or None,
        ssl_keyfile=config.tls_key or None,
        timeout_graceful_shutdown=max(round(config.grace), 1),
    )
    try:
        settings.load()
    except OSError as error:  # of ssl too
        _log.error(f"failed: tls_cert: cannot be used with tls_key: {error.strerror or error}")
        await client.aclose()
        return 1
    server = _Server(settings)
    # Uvicorn raises the signal that has ended it once more, for whoever else wants to know: here nobody.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with listener:
        await server.serve()
    if tracing is not None:
        await asyncio.to_thread(tracing.close)
    _log.info("stopped")
    return 0


class _Server(uvicorn.Server):
    """Says where it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers if self.started else ():
            for listener in server.sockets:
                name = listener.getsockname()
                _log.info("listening", address=f"unix:{name}" if isinstance(name, str) else _address(*name[:2]))


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


if __name__ == "__main__":
    main()
