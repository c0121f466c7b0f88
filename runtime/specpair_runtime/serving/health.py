"""The standard grpc.health.v1 service.

The servicer of grpcio-health-checking keeps one condition per service name for all who watch it: when one watcher
leaves, the others are never told of a change again, and a watcher that does not read holds up everyone. A drain must
reach every watcher, so this one gives each change an event of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


class Health:
    """Serving status by service name; "" stands for the whole server. To be used on the event loop only."""

    SERVICE = "grpc.health.v1.Health"

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {"": False}
        self._changed = asyncio.Event()
        self._stopping = False

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def set(self, services: Iterable[str], *, serving: bool) -> None:
        """Sets services and the server itself to SERVING or NOT_SERVING; without effect once shut down."""
        if self._stopping:
            return
        self._serving.update(dict.fromkeys(["", *services], serving))
        self._announce()

    def shut_down(self) -> None:
        """Sets everything to NOT_SERVING for good and lets watches end, so that they do not hold up a drain."""
        self._serving = dict.fromkeys(self._serving, False)
        self._stopping = True
        self._announce()

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        serving = self._serving.get(service)
        if serving is None:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        return health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING

    async def Check(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for a service that this server does not have."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def List(  # noqa: N802 - newer versions of the library register it and need it
        self,
        request: health_pb2.HealthListRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthListRequest, health_pb2.HealthListResponse],
    ) -> health_pb2.HealthListResponse:
        """The status of every service now, and of the server under ""."""
        statuses = {service: health_pb2.HealthCheckResponse(status=self._status(service)) for service in self._serving}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and after every change, until the server stops."""
        last = None
        while True:
            # Taken before the status is read: a change in between sets this event, so none is missed.
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
                continue
            if self._stopping:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the service stops")
            await changed.wait()
