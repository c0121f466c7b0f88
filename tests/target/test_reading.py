"""Reading a stream ahead of its answers: in order, bounded, with nothing left behind."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from specpair_target.reading import read_ahead

from .driving import run

LIMIT = 4


class Sender:
    """Sends numbers, and counts how many were taken; raises `error` behind the last one."""

    def __init__(self, count, error=None):
        self.taken = 0
        self._count, self._error = count, error

    async def __aiter__(self):
        while self.taken < self._count:
            self.taken += 1
            yield self.taken - 1
        if self._error is not None:
            raise self._error


class Engine:
    """Keeps what was submitted until it is told to answer; numbers in `waits` have to wait for all before them."""

    def __init__(self, waits=(), refuses=()):
        self.pending = []
        self._waits, self._refuses = waits, refuses

    def submit(self, number):
        if number in self._refuses:
            raise ValueError(number)
        if number in self._waits:
            return None
        self.pending.append(asyncio.get_running_loop().create_future())
        return [self.pending[-1]]

    def answer_all(self):
        for number, future in enumerate(self.pending):
            if not future.done():
                future.set_result(number)


async def settled():
    """Lets everything happen that can."""
    for _ in range(50):
        await asyncio.sleep(0)


def ahead(sender, engine):
    return aclosing(read_ahead(aiter(sender), engine.submit, LIMIT))


def test_messages_are_submitted_before_the_answers_are_there():
    """Up to the limit; then the sender is left waiting, and each answer that was dealt with makes room for one."""

    async def check():
        sender, engine = Sender(100), Engine()
        async with ahead(sender, engine) as messages:
            first = asyncio.ensure_future(anext(messages))
            await settled()
            assert len(engine.pending) == sender.taken == LIMIT
            engine.answer_all()
            _, (answer,) = await first
            assert await answer == 0
            await settled()
            assert sender.taken == LIMIT
            for taken in range(1, 10):
                await anext(messages)
                await settled()
                assert sender.taken == LIMIT + taken

    run(check())


def test_order_and_end():
    """Every message once, in order, with its own answer; the end comes behind the last one."""

    async def check():
        engine = Engine()
        seen = []
        async with ahead(Sender(20), engine) as messages:
            async for number, (answer,) in messages:
                engine.answer_all()
                seen.append((number, await answer))
        assert seen == [(number, number) for number in range(20)]

    run(check())


def test_a_message_that_has_to_wait_stops_the_reading():
    """Nothing behind it is read before the consumer is done with it."""

    async def check():
        sender, engine = Sender(6), Engine(waits=(2,))
        async with ahead(sender, engine) as messages:
            for number in range(2):
                assert (await anext(messages))[0] == number
            assert await anext(messages) == (2, None)
            await settled()
            assert sender.taken == 3
            assert (await anext(messages))[0] == 3
            await settled()
            assert sender.taken == 6

    run(check())


@pytest.mark.parametrize("place", ["submit", "stream"])
def test_an_error_comes_in_its_place(place):
    """What is wrong with a message, or with the stream, is raised behind the messages before it."""

    async def check():
        sender = Sender(3, error=ValueError("broken") if place == "stream" else None)
        engine = Engine(refuses=(3, 2) if place == "submit" else ())
        before = 2 if place == "submit" else 3
        async with ahead(sender, engine) as messages:
            await settled()
            for number in range(before):
                assert (await anext(messages))[0] == number
            with pytest.raises(ValueError, match="^2$" if place == "submit" else "^broken$"):
                await anext(messages)

    run(check())


def test_closing_between_the_answers_to_one_message():
    """Those that were not awaited yet are cancelled, like those of later messages."""

    async def check():
        loop = asyncio.get_running_loop()
        answers = {number: [loop.create_future() for _ in range(3)] for number in range(2)}
        answers[0][0].set_result("said")
        async with aclosing(read_ahead(aiter(Sender(2)), answers.get, LIMIT)) as messages:
            number, (first, *_) = await anext(messages)
            assert (number, await first) == (0, "said")
            await settled()
        assert all(answer.cancelled() for answer in [*answers[0][1:], *answers[1]])

    run(check())


def test_closing_leaves_nothing_behind():
    """Answers that nobody awaited are cancelled, failed ones count as seen, and the reading task has ended."""

    async def check():
        engine = Engine()
        before = asyncio.all_tasks()
        async with ahead(Sender(100), engine) as messages:
            await anext(messages)
            await settled()
            engine.pending[1].set_exception(ValueError())
        assert asyncio.all_tasks() == before
        assert all(answer.cancelled() for answer in engine.pending[2:])

    run(check())
