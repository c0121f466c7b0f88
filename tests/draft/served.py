"""The draft's servicer behind a real server on loopback, inside this process."""

from __future__ import annotations

import asyncio
import contextlib

import grpc

from specpair.v1 import draft_pb2, draft_pb2_grpc
from specpair_draft.config import DraftConfig
from specpair_draft.servicer import DraftServicer
from specpair_runtime.serving import ServiceStatus
from specpair_runtime.serving.interceptors import CallInterceptor

from ..tiny import random_ids
from .conftest import CHUNK, MAX_LENGTH

PROMPT = random_ids(20)
WITHIN = 30  # seconds, for what must come


def load(tiny, status=None, **config):
    """A servicer on a tiny model with two slots; `stop` ends it."""
    defaults = {
        "dtype": "fp32",
        "device": "cpu",
        "slots": 2,
        "max_length": MAX_LENGTH,
        "prefill_chunk": CHUNK,
        "threads": 1,
    }
    status = status or ServiceStatus()
    servicer = DraftServicer(DraftConfig(model=tiny.path("llama-small"), **{**defaults, **config}), status)
    servicer.load(status)
    return servicer


@contextlib.asynccontextmanager
async def stub_of(servicer):
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    draft_pb2_grpc.add_DraftServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield draft_pb2_grpc.DraftServiceStub(channel)
    finally:
        await server.stop(None)


def conversation(servicer, talk):
    """Runs `talk(stub)`; afterwards every slot is free."""

    async def run():
        async with asyncio.timeout(2 * WITHIN):
            async with stub_of(servicer) as stub:
                await talk(stub)
                while servicer._engine.pool.in_use:  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(0.001)

    asyncio.run(run())


def start(ids=PROMPT, **fields):
    return draft_pb2.ProposeRequest(start=draft_pb2.ProposeStart(token_ids=ids, **fields))


def ask(round_=1, ids=(), at=20, most=4, **fields):
    return draft_pb2.ProposeRequest(
        ask=draft_pb2.ProposeAsk(round=round_, from_position=at, token_ids=ids, max_tokens=most, **fields)
    )


async def opened(stub, *requests):
    call = stub.Propose()
    for request in (start(), *requests):
        await call.write(request)
    assert (await call.read()).started.max_length == MAX_LENGTH
    return call


async def proposals(call, count):
    return [(await call.read()).proposal for _ in range(count)]
