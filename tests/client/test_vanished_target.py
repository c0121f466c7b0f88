"""A target's machine that is gone without a word: nothing closes the connection to it."""

from __future__ import annotations

import asyncio

import pytest

from specpair import grpc_transports
from specpair.errors import UnavailableError
from specpair.grpc_transports import GrpcTarget
from specpair.messages import Block, Start
from specpair.params import SamplingParams
from specpair.results import Source

from ..proxy import TcpProxy
from .loopback import TargetServicer, serving


def test_it_is_unavailable(monkeypatch):
    """A call without a deadline asks whether anybody is there, and ends where nobody answers."""
    limits = {
        "grpc.keepalive_time_ms": 1000,
        "grpc.keepalive_timeout_ms": 1000,
        "grpc.http2.ping_timeout_ms": 1000,
    }
    options = tuple((name, limits.get(name, value)) for name, value in grpc_transports._OPTIONS)
    monkeypatch.setattr(grpc_transports, "_OPTIONS", options)

    async def check():
        with serving(TargetServicer()) as address, TcpProxy.to(address) as proxy:
            target = GrpcTarget(proxy.address)
            stream = await target.verify(Start((3, 4, 5), SamplingParams()))
            await stream.receive()
            proxy.afflict(stall=True)
            await stream.send(Block(1, 3, None, (), Source.TARGET))
            async with asyncio.timeout(30):
                with pytest.raises(UnavailableError):
                    await stream.receive()
            proxy.heal()
            await target.close()

    asyncio.run(check())
