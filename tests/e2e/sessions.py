"""Calls by hand, below the client library: raw stubs and raw messages."""

from __future__ import annotations

import contextlib

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from specpair.v1 import common_pb2, target_pb2, target_pb2_grpc

APPLIED = target_pb2.Verdict.STATUS_APPLIED
STALE = target_pb2.Verdict.STATUS_STALE


def ids_prompt(ids):
    """A prompt of token ids."""
    return common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=ids))


def start_of(ids, **fields):
    """The first message of a session on token ids."""
    return target_pb2.VerifyRequest(start=target_pb2.SessionStart(prompt=ids_prompt(ids), **fields))


def violations(error):
    """Status code of a failed call and the field that its BadRequest names, "" if none."""
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return error.code(), bad.field_violations[0].field
    return error.code(), ""


@contextlib.asynccontextmanager
async def target_stub(address):
    """An asyncio stub."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield target_pb2_grpc.TargetServiceStub(channel)


class RawSession:
    """A Verify stream driven message by message. It follows the target's tokens and texts."""

    def __init__(self, call):
        self.call = call
        self.tokens = []
        self.output = []
        self.texts = []
        self.finish_reason = common_pb2.FINISH_REASON_UNSPECIFIED
        self.round = 0

    @classmethod
    async def open(cls, stub, ids, committed=(), **fields):
        """A session that has started."""
        session = cls(stub.Verify())
        await session.call.write(start_of(ids, committed_token_ids=committed, **fields))
        started = (await session.call.read()).started
        assert list(started.prompt_token_ids) == list(ids)
        assert started.length == len(ids) + len(committed)
        session.tokens = [*ids, *committed]
        return session

    def block(self, ids=(), **changes):
        """The next block, but for the changes."""
        fields = {"round": self.round + 1, "base_length": len(self.tokens), "last_token_id": self.tokens[-1]}
        return target_pb2.Block(**{**fields, "token_ids": ids, "source": common_pb2.SOURCE_MODEL, **changes})

    async def send(self, block):
        """The verdict on a block."""
        await self.call.write(target_pb2.VerifyRequest(block=block))
        return await self.receive()

    async def receive(self):
        """The next verdict."""
        response = await self.call.read()
        assert response is not grpc.aio.EOF, "the stream ended"
        verdict = response.verdict
        if verdict.status == APPLIED:
            committed = verdict.committed
            assert verdict.base_length == len(self.tokens)
            assert sum(committed.text_lengths) == len(committed.text_delta)
            text = committed.text_delta
            for length in committed.text_lengths:
                self.texts.append(text[:length])
                text = text[length:]
            self.round += 1
            self.tokens += committed.token_ids
            self.output += committed.token_ids
            self.finish_reason = committed.finish_reason
        return verdict

    async def finish(self):
        """Half-closes and waits for the end."""
        await self.call.done_writing()
        assert await self.call.read() is grpc.aio.EOF
        assert await self.call.code() == grpc.StatusCode.OK

    async def run(self):
        """Empty blocks until the turn ends; then the end of the stream. Returns the output's ids."""
        while not self.finish_reason:
            assert (await self.send(self.block())).status == APPLIED
        await self.finish()
        return self.output


@contextlib.asynccontextmanager
async def refused(code, field):
    """The block must fail with this status and this field."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert violations(caught.value) == (code, field), caught.value
