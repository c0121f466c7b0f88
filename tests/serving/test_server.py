"""From the first listening to the last call: health, reflection, loading, draining, exit statuses."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from specpair import errors
from specpair.v1 import common_pb2, target_pb2, target_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
INFO = target_pb2.TargetServiceGetModelInfoRequest()


async def _health(channel, service=""):
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


def _watch(channel, service=""):
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))


def _ready(service):
    return service.until(lambda: service.status.phase == common_pb2.PHASE_READY)


def test_answers_while_loading(running, fake, gate):
    """While the model loads, GetModelInfo reports how far it is and health says NOT_SERVING, for "" and the service."""

    async def check():
        def load(status):
            status.set(common_pb2.PHASE_COMPILING, 0.25, "the decode step")
            gate.wait()

        async with running(load=load) as service:
            await service.until(lambda: service.status.phase == common_pb2.PHASE_COMPILING)
            info = (await service.stub.GetModelInfo(INFO)).info
            assert (info.phase, info.progress, info.detail) == (common_pb2.PHASE_COMPILING, 0.25, "the decode step")
            assert await _health(service.channel) == NOT_SERVING
            assert await _health(service.channel, fake.SERVICE) == NOT_SERVING
            gate.set()
            await _ready(service)
            assert await _health(service.channel) == SERVING
            assert await _health(service.channel, fake.SERVICE) == SERVING
            assert (await service.stub.GetModelInfo(INFO)).info.phase == common_pb2.PHASE_READY

    asyncio.run(check())


def test_unknown_service(running):
    """Health knows only what is served: Check answers NOT_FOUND, Watch SERVICE_UNKNOWN."""

    async def check():
        async with running() as service:
            with pytest.raises(grpc.RpcError) as failed:
                await _health(service.channel, "nobody")
            assert failed.value.code() is grpc.StatusCode.NOT_FOUND
            assert (await _watch(service.channel, "nobody").read()).status == UNKNOWN

    asyncio.run(check())


def test_every_watcher_sees_every_change(running, fake, gate):
    """Watchers see NOT_SERVING, then SERVING, then NOT_SERVING at the end, also after another watcher has left."""

    async def check():
        async with running(load=lambda status: gate.wait()) as service:
            leaver, *watches = [_watch(service.channel, fake.SERVICE) for _ in range(3)]
            for watch in (leaver, *watches):
                assert (await watch.read()).status == NOT_SERVING
            leaver.cancel()
            await asyncio.sleep(0.05)
            gate.set()
            for watch in watches:
                assert (await watch.read()).status == SERVING
            signal.raise_signal(signal.SIGTERM)
            for watch in watches:
                assert (await watch.read()).status == NOT_SERVING
                with pytest.raises(grpc.RpcError) as ended:
                    await watch.read()
                assert ended.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(check())


def test_reflection_v1alpha(running, fake):
    """A client of v1alpha finds the service and its messages."""

    async def check():
        async with running() as service:
            await asyncio.to_thread(look, service.address)

    def look(address):
        with grpc.insecure_channel(address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert {fake.SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
            descriptor = DescriptorPool(database).FindServiceByName(fake.SERVICE)
            assert descriptor.methods_by_name["Verify"].input_type.name == "VerifyRequest"

    asyncio.run(check())


def test_reflection_v1(running, fake):
    """The same answers come under grpc.reflection.v1; with reflection off there are none."""

    def open_stream(service):
        return service.channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )()

    async def check():
        async with running() as service:
            stream = open_stream(service)
            await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            listed = (await stream.read()).list_services_response
            assert fake.SERVICE in [each.name for each in listed.service]
            await stream.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=fake.SERVICE))
            assert (await stream.read()).file_descriptor_response.file_descriptor_proto
        async with running(reflection=False) as service:
            # Nothing is sent: grpc.aio reports a send that meets a call already refused as INTERNAL.
            assert await open_stream(service).code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(check())


def test_messages_stay_limited(running):
    """A message above 4 MiB is refused with RESOURCE_EXHAUSTED and the service goes on."""

    async def check():
        async with running() as service:
            prompt = common_pb2.Prompt(text="x" * (4 << 20))
            with pytest.raises(grpc.RpcError) as failed:
                await service.stub.Tokenize(target_pb2.TokenizeRequest(prompt=prompt))
            assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await service.stub.GetModelInfo(INFO)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.ModelLoadError("no such directory", field="model"), "model: no such directory"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
)
def test_failed_load_ends_the_service(running, error, reason):
    """When the load raises, the status says why, the service closes and its exit status is 1."""

    async def check():
        closed = []

        def load(status):
            raise error

        async with running(load=load, close=lambda: closed.append(True)) as service:
            assert await asyncio.wait_for(service.task, 30) == 1
            assert service.status.phase == common_pb2.PHASE_FAILED
            assert service.status.snapshot.detail == reason
            assert closed

    asyncio.run(check())


def test_failure_while_serving_ends_the_service(running):
    """A failure reported from a thread while serving ends the service with exit status 1, calls included."""

    async def check():
        async with running() as service:
            await _ready(service)
            stream = service.stub.Verify()
            await stream.write(target_pb2.VerifyRequest())
            await stream.read()
            await asyncio.to_thread(service.status.fail, "the engine died")
            assert await asyncio.wait_for(service.task, 30) == 1

    asyncio.run(check())


def test_drain_lets_sessions_finish(running):
    """SIGTERM turns health NOT_SERVING and refuses new calls; an open session finishes; close comes after it."""

    async def check():
        closed = []
        async with running(close=lambda: closed.append(True)) as service:
            await _ready(service)
            stream = service.stub.Verify()
            await stream.write(target_pb2.VerifyRequest())
            await stream.read()
            signal.raise_signal(signal.SIGTERM)
            await service.until(lambda: service.status.phase == common_pb2.PHASE_DRAINING)
            # Longer than calls on open connections are answered at all.
            await asyncio.sleep(0.5)
            async with grpc.aio.insecure_channel(service.address) as late:
                with pytest.raises(grpc.RpcError) as refused:
                    await target_pb2_grpc.TargetServiceStub(late).GetModelInfo(INFO)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            await stream.write(target_pb2.VerifyRequest(block=target_pb2.Block(round=5)))
            assert (await stream.read()).verdict.round == 5
            assert not closed
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
            assert await asyncio.wait_for(service.task, 30) == 0
            assert closed

    asyncio.run(check())


def test_grace_is_bounded(running):
    """A session that does not end within the grace is cut off, and the exit status is still 0."""

    async def check():
        async with running(grace=0.2) as service:
            await _ready(service)
            stream = service.stub.Verify()
            await stream.write(target_pb2.VerifyRequest())
            await stream.read()
            signal.raise_signal(signal.SIGINT)
            assert await asyncio.wait_for(service.task, 30) == 0
            assert service.servicer.open_sessions == 0

    asyncio.run(check())


def test_second_signal_ends_at_once(running):
    """A second signal does not wait for the grace: exit status 128 plus its number."""

    async def check():
        async with running(grace=60) as service:
            await _ready(service)
            stream = service.stub.Verify()
            await stream.write(target_pb2.VerifyRequest())
            await stream.read()
            signal.raise_signal(signal.SIGTERM)
            await service.until(lambda: service.status.phase == common_pb2.PHASE_DRAINING)
            signal.raise_signal(signal.SIGTERM)
            assert await asyncio.wait_for(service.task, 30) == 128 + signal.SIGTERM

    asyncio.run(check())


def test_process_drains_on_sigterm(start):
    """As a process: listening, ready, stopping, stopped, exit status 0, every line JSON on stderr."""
    service = start()
    address = service.wait_for("listening")["address"]
    service.wait_for("ready")
    with grpc.insecure_channel(address) as channel:
        target_pb2_grpc.TargetServiceStub(channel).GetModelInfo(INFO, metadata=(("x-request-id", "r-1"),))
    line = service.wait_for("call")
    assert (line["request_id"], line["status"]) == ("r-1", "OK")
    service.process.send_signal(signal.SIGTERM)
    assert service.wait_for("stopping")["signal"] == "SIGTERM"
    assert service.finish() == 0
    assert all(text.startswith("{") for text in service.lines)


def test_process_stops_during_load(start):
    """SIGTERM during a long load ends the process at once with exit status 0."""
    service = start("--load-seconds=60")
    service.wait_for("listening")
    service.process.send_signal(signal.SIGTERM)
    assert service.finish() == 0


def test_process_stops_on_second_signal_while_closing(start):
    """A close that hangs does not keep a second signal from ending the process."""
    service = start("--close-seconds=60")
    service.wait_for("ready")
    service.process.send_signal(signal.SIGTERM)
    service.wait_for("stopping")
    service.process.send_signal(signal.SIGINT)
    assert service.finish() == 128 + signal.SIGINT


def test_process_reports_progress_and_failure(start):
    """Off a terminal loading logs every tenth of it, and a failed load says why on one line and exits with 1."""
    service = start("--load-error=typed")
    assert service.wait_for("failed")["event"] == "failed: model: no such directory"
    assert service.finish() == 1
    assert 10 <= sum('"loading"' in line for line in service.lines) <= 12
    assert "Traceback" not in "".join(service.lines)


def test_port_in_use(start):
    """A second service on a port says that it cannot listen there, and why, and exits with 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        service = start(f"--listen={address}")
        event = service.wait_for("failed")["event"]
        assert event == f"failed: listen: cannot listen on {address}: Address already in use"
        assert service.finish() == 1
        assert all(text.startswith("{") for text in service.lines)


def test_port_in_use_by_another_service(start):
    """Two services do not share a port."""
    address = start().wait_for("listening")["address"]
    second = start(f"--listen={address}")
    assert address in second.wait_for("failed")["event"]
    assert second.finish() == 1


def test_serving_needs_no_torch():
    """Importing the serving package loads neither torch nor transformers."""
    code = "import sys, specpair_runtime.serving; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
