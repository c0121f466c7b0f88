"""The target's servicer behind a real server on loopback, inside this process."""

from __future__ import annotations

import asyncio
import contextlib

import grpc

from specpair.v1 import common_pb2, target_pb2, target_pb2_grpc
from specpair_runtime.serving import CallInterceptor, ServiceStatus
from specpair_runtime.serving.identity import name_by_token
from specpair_target.config import TargetConfig
from specpair_target.servicer import TargetServicer

from .. import failing

WITHIN = 30  # seconds, for what must come
DEFAULTS = {
    "dtype": "fp32",
    "device": "cpu",
    "slots": 2,
    "max_length": 384,
    "prefill_chunk": 32,
    "threads": 1,
}


def load(tiny, name, **config):
    """A servicer on a tiny model; `stop` ends it."""
    servicer = TargetServicer(TargetConfig(model=tiny.path(name), **{**DEFAULTS, **config}), ServiceStatus())
    servicer.load(ServiceStatus())
    return servicer


class Names(grpc.aio.ServerInterceptor):
    """Takes the caller's name from the metadata, as if it were that of a token."""

    async def intercept_service(self, continuation, details):
        name_by_token(dict(details.invocation_metadata).get("name", ""))
        return await continuation(details)


@contextlib.asynccontextmanager
async def stub_of(servicer, patience=0.0, **options):
    """A stub with its own connection."""
    server = grpc.aio.server(interceptors=[CallInterceptor(patience=patience), Names()])
    target_pb2_grpc.add_TargetServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=list(options.items())) as channel:
            yield target_pb2_grpc.TargetServiceStub(channel)
    finally:
        await server.stop(None)


def conversation(servicer, talk, **options):
    """Runs `talk(stub)` and returns what it does; afterwards every slot is free and nobody waits."""

    async def run():
        async with asyncio.timeout(2 * WITHIN), stub_of(servicer, **options) as stub:
            result = await talk(stub)
            await free(servicer)
            return result

    return asyncio.run(run())


async def free(servicer):
    """Waits until no slot is in use."""
    while servicer._engine.pool.in_use:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0.001)


def prompt(ids):
    return common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=ids))


def start(ids, **fields):
    return target_pb2.VerifyRequest(start=target_pb2.SessionStart(prompt=prompt(ids), **fields))


def block(at, ids=(), round_=1, **fields):
    return target_pb2.VerifyRequest(
        block=target_pb2.Block(round=round_, base_length=at, token_ids=ids, **fields),
    )


async def opened(stub, ids, *requests, **options):
    """A session that has started, with what else was sent to it."""
    call = stub.Verify(**options)
    for request in (start(ids), *requests):
        await call.write(request)
    assert (await call.read()).started.length == len(ids)
    return call


async def generated(stub, ids, count, **options):
    """What a prompt goes on with."""
    request = target_pb2.GenerateRequest(prompt=prompt(ids), sampling=common_pb2.SamplingParams(max_new_tokens=count))
    return [id_ async for response in stub.Generate(request, **options) for id_ in response.committed.token_ids]


async def failure(call):
    """The error that a call ends with, and its trailing metadata."""
    return await failing.failure(call), dict(await call.trailing_metadata())
