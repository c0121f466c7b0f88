"""How calls end when the service does: refused or ended with a reason that a client can act on."""

from __future__ import annotations

import asyncio
import signal

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specpair import errors
from specpair.v1 import common_pb2, target_pb2, target_pb2_grpc
from specpair_runtime.serving import server

from ..failing import failure

INFO = target_pb2.TargetServiceGetModelInfoRequest()
TEXT = target_pb2.TokenizeRequest(prompt=common_pb2.Prompt(text="x"))
ENDLESS = target_pb2.GenerateRequest(prompt=common_pb2.Prompt(text="endless"))
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def ready(service):
    await service.until(lambda: service.status.phase == common_pb2.PHASE_READY)


async def opened(service):
    """A session that has been answered once."""
    stream = service.stub.Verify()
    await stream.write(target_pb2.VerifyRequest())
    await stream.read()
    return stream


def drain(service):
    """Sends the signal and waits until the service has taken it."""
    signal.raise_signal(signal.SIGTERM)
    return service.until(lambda: service.status.phase == common_pb2.PHASE_DRAINING)


def is_draining(error):
    return isinstance(error, errors.UnavailableError) and error.reason == "DRAINING"


def test_new_calls_on_open_connections_are_refused_with_the_reason(running, monkeypatch):
    """From the signal on calls of every kind get UNAVAILABLE and DRAINING; health and GetModelInfo say what goes on."""
    monkeypatch.setattr(server, "_NOTICE", 3.0)  # after the goodbye gRPC may cancel a call, whatever its reason

    async def check():
        async with running(grace=30) as service:
            await ready(service)
            session = await opened(service)
            await drain(service)
            with pytest.raises(grpc.RpcError) as failed:
                await service.stub.Tokenize(TEXT)
            assert is_draining(errors.from_rpc_error(failed.value))
            assert is_draining(await failure(service.stub.Generate(ENDLESS)))
            assert is_draining(await failure(service.stub.Verify()))
            health = await health_pb2_grpc.HealthStub(service.channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == NOT_SERVING
            assert (await service.stub.GetModelInfo(INFO)).info.phase == common_pb2.PHASE_DRAINING
            await session.done_writing()
            assert await session.read() is grpc.aio.EOF
            assert await asyncio.wait_for(service.task, 30) == 0

    asyncio.run(check())


def test_what_outlasts_the_grace_ends_as_draining(running):
    """Sessions, generations and unary calls that are left after the grace end with UNAVAILABLE and DRAINING, their
    handlers' `finally` included, and the exit status is 0."""

    async def check():
        async with running(grace=0.5) as service:
            await ready(service)
            calls = [await opened(service) for _ in range(3)]
            calls.append(service.stub.Generate(ENDLESS))
            await calls[-1].read()
            await drain(service)
            outcomes = await asyncio.gather(*map(failure, calls))
            assert all(map(is_draining, outcomes)), outcomes
            assert await asyncio.wait_for(service.task, 30) == 0
            assert service.servicer.open_sessions == 0

    asyncio.run(check())


def test_a_client_that_reads_nothing_does_not_hold_up_the_end(running):
    """A call whose client takes no answers is cut off soon after the grace."""

    async def check():
        async with running(grace=0.3) as service:
            await ready(service)
            stuck = service.stub.Generate(ENDLESS)
            await stuck.read()
            await asyncio.sleep(0.2)
            await drain(service)
            assert await asyncio.wait_for(service.task, 30) == 0
            stuck.cancel()

    asyncio.run(check())


def test_a_failure_ends_calls_as_unavailable(running, monkeypatch):
    """When the engine dies health says NOT_SERVING, calls end with UNAVAILABLE and FAILED, and the exit status is 1."""
    monkeypatch.setattr(server, "_LAST_WORDS", 30.0)  # the session's status is on its way for as long as it takes

    async def check():
        async with running(grace=30) as service:
            await ready(service)
            watch = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest())
            await watch.read()
            session = await opened(service)
            await asyncio.to_thread(service.status.fail, "the engine died")
            assert (await watch.read()).status == NOT_SERVING
            error = await failure(session)
            assert isinstance(error, errors.UnavailableError)
            assert error.reason == "FAILED"
            assert await asyncio.wait_for(service.task, 30) == 1

    asyncio.run(check())


def test_calls_during_the_whole_drain(running):
    """Whoever calls at any moment of the drain, on whichever connection, is told UNAVAILABLE; a call that crosses the
    goodbye on its connection may be cancelled by gRPC, which no handler sees."""

    async def check():
        seen = []

        async def caller(service, own):
            channel = grpc.aio.insecure_channel(
                service.address, options=[("grpc.use_local_subchannel_pool", 1)] if own else None
            )
            async with channel:
                stub = target_pb2_grpc.TargetServiceStub(channel)
                while not service.task.done():
                    try:
                        await stub.Tokenize(TEXT)
                        seen.append(grpc.StatusCode.OK)
                    except grpc.RpcError as failed:
                        seen.append(failed.code())
                    await asyncio.sleep(0.001)

        async with running(grace=0.6) as service:
            await ready(service)
            session = await opened(service)
            callers = [asyncio.create_task(caller(service, own)) for own in (False, True, True)]
            await asyncio.sleep(0.1)
            await drain(service)
            assert await asyncio.wait_for(service.task, 30) == 0
            await asyncio.gather(*callers)
            assert is_draining(await failure(session))
        assert set(seen) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        # One for each connection, if any.
        assert seen.count(grpc.StatusCode.CANCELLED) <= 3

    asyncio.run(check())


def test_connections_grow_old(running):
    """With a maximum age a connection is given up for a new one, and a session that is open on it goes on."""

    async def check():
        async with running(max_connection_age=0.2) as service:
            await ready(service)
            session = await opened(service)
            peers = set()
            async with asyncio.timeout(10):
                while len(peers) < 3:
                    call = service.stub.Tokenize(TEXT)
                    await call
                    peers.add(dict(await call.trailing_metadata()).get("x-peer"))
                    await asyncio.sleep(0.05)
            await session.write(target_pb2.VerifyRequest(block=target_pb2.Block(round=7)))
            assert (await session.read()).verdict.round == 7
            await session.done_writing()
            assert await session.read() is grpc.aio.EOF

    asyncio.run(check())


def test_an_old_connection_is_cut_after_its_grace(running):
    """With a grace for old connections a session that outlasts it breaks, as one that can be resumed elsewhere."""

    async def check():
        async with running(max_connection_age=0.2, max_connection_age_grace=0.2) as service:
            await ready(service)
            assert isinstance(await failure(await opened(service)), errors.UnavailableError)
            await service.until(lambda: service.servicer.open_sessions == 0)

    asyncio.run(check())
