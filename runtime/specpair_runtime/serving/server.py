"""The life of a service process: listen, load, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from prometheus_client import CollectorRegistry

from specpair.addresses import is_local
from specpair.errors import InvalidRequestError, SpecpairError, UnavailableError
from specpair.v1 import common_pb2
from specpair_runtime.serving.auth import token_interceptors
from specpair_runtime.serving.calls import Calls
from specpair_runtime.serving.config import ServiceConfig
from specpair_runtime.serving.ending import Ending
from specpair_runtime.serving.health import Health
from specpair_runtime.serving.interceptors import CallInterceptor
from specpair_runtime.serving.metrics import CallMetrics
from specpair_runtime.serving.metrics_listener import MetricsListener
from specpair_runtime.serving.progress import shown
from specpair_runtime.serving.reflection import add_reflection
from specpair_runtime.serving.status import ServiceStatus
from specpair_runtime.serving.tls import server_credentials
from specpair_runtime.serving.tracing import Tracing, configure_tracing

# Messages stay limited to 4 MiB, gRPC's default.
_OPTIONS = (
    # Two services on one port would share its connections at random; the second one must fail instead.
    ("grpc.so_reuseport", 0),
    # Clients ping every 60 s to keep idle sessions alive through proxies. The default answers that with GOAWAY.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    # A machine that is gone closes nothing: whose client does not answer either has its calls ended, its slot free.
    ("grpc.keepalive_time_ms", 60_000),
    # Bytes that nobody acknowledges are waited for so long, and pings that nobody answers.
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
)

# Seconds between NOT_SERVING and the goodbye on every connection. gRPC cancels a call that crosses a goodbye, and that
# says nothing to its client; until then it is refused with a reason, and whoever watches health stays away.
_NOTICE = 0.25
# Seconds for the status of a call that is ended. One whose client reads nothing never gets there.
_LAST_WORDS = 1.0

_log = structlog.stdlib.get_logger("specpair")


Register = Callable[[grpc.aio.Server], Sequence[str]]
Load = Callable[[ServiceStatus], None]
Close = Callable[[], None]


@dataclass(frozen=True)
class _Service:
    register: Register
    load: Load
    status: ServiceStatus
    close: Close
    registry: CollectorRegistry | None


@dataclass(frozen=True)
class _Outcome:
    exit_status: int
    # A thread is still at work and nothing can stop it.
    abandoned: bool = False


def run(
    config: ServiceConfig,
    *,
    register: Register,
    load: Load,
    status: ServiceStatus,
    close: Close,
    registry: CollectorRegistry | None = None,
) -> int:
    """Runs `serve` with the start shown on stderr, and returns its exit status. For mains.

    When a signal during the load or a second signal leaves a thread at work, this ends the process by itself.
    """
    with shown(status):
        outcome = asyncio.run(_serve(config, _Service(register, _frozen(load), status, close, registry), None))
    if outcome.abandoned:
        # A native thread that asks for the GIL back while the interpreter exits is killed there, which may abort the
        # process with a status of its own.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(outcome.exit_status)
    return outcome.exit_status


def _frozen(load: Load) -> Load:
    """`load`, and then nothing of what is there is looked at by the garbage collector again.

    A model and its libraries are hundreds of thousands of objects. A full collection that walks through them holds the
    interpreter for a quarter of a second, in which nothing is answered, health included.
    """

    def loading(status: ServiceStatus) -> None:
        load(status)
        gc.collect()
        gc.freeze()

    return loading


async def serve(
    config: ServiceConfig,
    *,
    register: Register,
    load: Load,
    status: ServiceStatus,
    close: Close,
    on_listening: Callable[[str], None] | None = None,
    registry: CollectorRegistry | None = None,
) -> int:
    """Runs a service until a signal or a failure ends it, and returns the exit status of its process.

    `register` adds the servicers and returns the full names of their services. It is called first: the servicers must
    answer GetModelInfo before anything is loaded.
    `load` runs in a thread of its own while the server already listens; health is NOT_SERVING until it returns.
    `close` runs in a thread of its own after the last call has ended, also when `load` raised. It is left out when the
    service could not begin to listen and when the load still goes on.
    `on_listening` gets the address in use.
    `registry` gets the metrics of calls and is served at `config.metrics_listen`, if there is one.

    Returns 0 after SIGTERM or SIGINT: health turns NOT_SERVING at once, new calls are refused, and running calls get
    `config.grace` seconds to end; those that are left are ended. Both are UNAVAILABLE with the reason DRAINING.
    Returns 1 when TLS or tokens cannot be set up as configured, when the address cannot be bound, when `load` raises,
    and when anything calls `status.fail`; the reason is logged, and calls that run are UNAVAILABLE with the reason
    FAILED. Returns 128 plus its number after a second signal, which ends at once, without `close`.
    Raises what `close` raises. Cancelling this ends all calls at once and closes.
    """
    return (await _serve(config, _Service(register, load, status, close, registry), on_listening)).exit_status


async def _serve(config: ServiceConfig, service: _Service, on_listening: Callable[[str], None] | None) -> _Outcome:
    try:
        credentials, guards = server_credentials(config), token_interceptors(config)
        tracing = configure_tracing(config.program, wanted=config.otel)
    except InvalidRequestError as error:
        return _refuse(service.status, error)
    calls = Calls()
    # Outermost stands what logs calls: those that are denied too.
    metrics = CallMetrics(service.registry, calls)
    interceptors = [CallInterceptor(calls, config.idle_timeout, metrics.ended, tracing), *guards]
    server = grpc.aio.server(interceptors=interceptors, options=_options(config))
    services = [*service.register(server), Health.SERVICE]
    metrics.know(services)
    health = Health()
    health.add_to(server)
    health.set(services, serving=False)
    if config.reflection:
        add_reflection(server, services)
    try:
        address = _bind(server, config.listen, credentials)
        listener = MetricsListener(config.metrics_listen, service.registry)
    except UnavailableError as error:
        return _refuse(service.status, error)
    if credentials is None and not is_local(config.listen):
        _log.warning("no TLS: prompts and outputs cross the network in plain text", address=address)
    with listener, Ending(service.status) as ending:
        await server.start()
        _log.info("listening", address=address)
        if on_listening is not None:
            on_listening(address)
        loading = _in_thread(lambda: service.load(service.status), "load")
        exit_status: int | None = None
        try:
            await _first(loading, ending.asked)
            if loading.done() and _loaded(loading, service.status):
                health.set(services, serving=True)
                _log.info("ready", address=address)
            exit_status = await asyncio.shield(ending.asked)
            if exit_status:
                _log.error(f"failed: {service.status.snapshot.detail}")
        finally:
            # Cancelled or failed: there is nothing to wait for.
            grace = 0.0 if exit_status != 0 else config.grace
            service.status.set(common_pb2.PHASE_DRAINING)
            health.shut_down()
            calls.refuse(*(("the service failed", "FAILED") if exit_status else ("the service stops", "DRAINING")))
            close = service.close if loading.done() else None
            stopping = asyncio.ensure_future(_stop(server, calls, grace, close, tracing))
            await _first(stopping, ending.forced)
        if not stopping.done():
            stopping.cancel()
            # A server that nobody has stopped does not let the loop end.
            await asyncio.wait([asyncio.ensure_future(server.stop(None))], timeout=_LAST_WORDS)
            return _Outcome(ending.forced.result(), abandoned=True)
        stopping.result()
        _log.info("stopped")
        return _Outcome(exit_status, abandoned=not loading.done())


def _refuse(status: ServiceStatus, error: SpecpairError) -> _Outcome:
    status.fail(str(error))
    _log.error(f"failed: {error}")
    return _Outcome(1)


def _bind(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None) -> str:
    """The address in use, with the real port. Raises UnavailableError."""
    # gRPC does not pass on the system's reason, prints lines of its own, and takes an address of which only a part is
    # free. So the usual case is found before it tries.
    reason = _refusal(listen)
    if reason == os.strerror(errno.EADDRINUSE):
        raise UnavailableError(f"cannot listen on {listen}: {reason}", field="listen")
    try:
        port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    except RuntimeError as error:
        raise UnavailableError(f"cannot listen on {listen}: {reason or error}", field="listen") from None
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


def _refusal(listen: str) -> str:
    """The system's reason for refusing an address, or one of those that a name stands for; "" when it takes all."""
    host, _, port = listen.rpartition(":")
    if listen.startswith("unix:"):
        return ""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _options(config: ServiceConfig) -> list[tuple[str, int]]:
    """gRPC's options."""
    options = list(_OPTIONS)
    if config.max_connection_age:
        options.append(("grpc.max_connection_age_ms", _milliseconds(config.max_connection_age)))
        if config.max_connection_age_grace:
            options.append(("grpc.max_connection_age_grace_ms", _milliseconds(config.max_connection_age_grace)))
    return options


def _milliseconds(seconds: float) -> int:
    # 0 would close every connection as soon as it is there.
    return max(round(seconds * 1000), 1)


def _loaded(loading: asyncio.Future[None], status: ServiceStatus) -> bool:
    """Whether the service is ready; enters READY or FAILED."""
    error = loading.exception()
    if error is None:
        status.set(common_pb2.PHASE_READY, 1.0)
    elif isinstance(error, SpecpairError):
        status.fail(str(error))
    else:
        _log.error("unexpected error while loading", exc_info=error)
        status.fail(f"{type(error).__name__}: {error}")
    return status.phase == common_pb2.PHASE_READY


async def _stop(
    server: grpc.aio.Server, calls: Calls, grace: float, close: Close | None, tracing: Tracing | None
) -> None:
    """Waits for the calls that run, at most `grace` seconds, and ends the others; then closes."""
    notice = min(grace, _NOTICE)
    await asyncio.sleep(notice)
    goodbye = asyncio.ensure_future(server.stop(grace - notice + _LAST_WORDS))
    await calls.ended(grace - notice)
    calls.end()
    await goodbye
    if close is not None:
        await _in_thread(close, "close")
    if tracing is not None:
        await _in_thread(tracing.close, "traces")


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _in_thread(work: Callable[[], None], name: str) -> asyncio.Future[None]:
    """Runs `work` in a daemon thread; unlike an executor's, it keeps neither the loop nor the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def report(error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def body() -> None:
        failure: BaseException | None = None
        try:
            work()
        except BaseException as error:
            failure = error
        # The loop is closed when nobody waits any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(report, failure)

    threading.Thread(target=body, name=name, daemon=True).start()
    return done
