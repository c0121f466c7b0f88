"""Clients that are gone without a word, as a machine that loses its power is: nothing closes their connections."""

from __future__ import annotations

import asyncio

import grpc

from specpair.v1 import target_pb2, target_pb2_grpc
from specpair_runtime.serving import server

from ..proxy import TcpProxy


def test_its_stream_ends(running, monkeypatch):
    """The service asks a silent connection whether anybody is there, and ends the calls of one that does not answer;
    a client that is idle and answers stays."""
    limits = {"grpc.keepalive_time_ms": 1000, "grpc.keepalive_timeout_ms": 4000, "grpc.http2.ping_timeout_ms": 4000}
    monkeypatch.setattr(server, "_OPTIONS", tuple((name, limits.get(name, value)) for name, value in server._OPTIONS))

    async def check():
        async with running(idle_timeout=0) as service:
            host, _, port = service.address.rpartition(":")
            with TcpProxy(host, int(port)) as proxy:
                async with grpc.aio.insecure_channel(proxy.address) as channel:
                    vanishing = target_pb2_grpc.TargetServiceStub(channel).Verify()
                    idle = service.stub.Verify()
                    for stream in (vanishing, idle):
                        await stream.write(target_pb2.VerifyRequest())
                        await stream.read()
                    await asyncio.sleep(6)
                    assert service.servicer.open_sessions == 2, "clients that answer were taken for gone"
                    proxy.afflict(stall=True)
                    await service.until(lambda: service.servicer.open_sessions == 1)
                    await idle.write(target_pb2.VerifyRequest())
                    assert await idle.read() is not grpc.aio.EOF
                    proxy.heal()

    asyncio.run(check())
