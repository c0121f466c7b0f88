"""Streams that are left open and forgotten end, and no others."""

from __future__ import annotations

import asyncio

import pytest

from specpair.errors import UnavailableError
from specpair_runtime.serving import Attended

LIMIT = 0.1


class Client:
    """Sends what it is told to."""

    def __init__(self):
        self.said = asyncio.Queue()

    def __aiter__(self):
        return self

    async def __anext__(self):
        message = await self.said.get()
        if message is None:
            raise StopAsyncIteration
        return message


async def expires(attended):
    with pytest.raises(UnavailableError) as ended:
        await anext(attended)
    return ended.value.reason == "SESSION_EXPIRED"


def test_it_is_the_clients_turn():
    """Before the first message, and whenever all messages are answered, silence ends the stream."""

    async def check():
        assert await expires(Attended(Client(), LIMIT))
        client = Client()
        attended = Attended(client, LIMIT)
        for number in range(1, 4):
            client.said.put_nowait(number)
            assert await anext(attended) == number
            attended.answered(number)
        assert await expires(attended)

    asyncio.run(check())


def test_it_is_the_services_turn():
    """While an answer is owed nothing ends the stream; the client's time begins with the answer."""

    async def check():
        client = Client()
        attended = Attended(client, LIMIT)
        for number in (1, 2):
            client.said.put_nowait(number)
            await anext(attended)
        attended.answered(1)
        waiting = asyncio.create_task(anext(attended))
        await asyncio.sleep(3 * LIMIT)
        assert not waiting.done()
        attended.answered(2)
        await asyncio.sleep(LIMIT / 2)
        assert not waiting.done()
        with pytest.raises(UnavailableError):
            await waiting

    asyncio.run(check())


def test_an_end_is_an_end():
    """A client that has no more to say ends the stream as before."""

    async def check():
        client = Client()
        client.said.put_nowait("first")
        client.said.put_nowait(None)
        assert [message async for message in Attended(client, LIMIT)] == ["first"]

    asyncio.run(check())


def test_without_a_limit():
    """With 0 a stream lies idle for as long as it likes, before its first message too."""

    async def check():
        attended = Attended(Client(), 0.0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(attended), 3 * LIMIT)

    asyncio.run(check())
