"""The draft's stream: asks are read while proposals are sent, and the slot is free whatever ends the stream."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest

from specpair.v1 import common_pb2, draft_pb2
from specpair_draft.asks import Proposal, Timed, Turn
from specpair_draft.servicer import _Stream

from ..tiny import random_ids
from .conftest import MAX_LENGTH
from .served import PROMPT, WITHIN, ask, conversation, load, opened, proposals, start


@pytest.fixture(scope="module")
def servicer(tiny):
    """A draft service on a tiny model with two slots, without a server."""
    servicer = load(tiny)
    yield servicer
    servicer.stop()


@pytest.fixture
def gate(servicer, monkeypatch):
    """Stops the engine in front of a step, after so many of them, until it is opened."""
    runner = servicer._engine.model.runner
    logits = runner.logits

    class Gate:
        def __init__(self):
            self.reached, self._open = threading.Event(), threading.Event()
            self.left = 0

        def __call__(self, *args):
            if self.left <= 0:
                self.reached.set()
                assert self._open.wait(WITHIN)
            self.left -= 1
            return logits(*args)

        def open(self):
            self._open.set()

    gate = Gate()
    monkeypatch.setattr(runner, "logits", gate)
    yield gate
    gate.open()


def test_several_proposals_come_as_they_are_ready(servicer, gate):
    """The first one is there before the last one is computed; each says its round, its number and what it continues."""
    gate.left = 6

    async def talk(stub):
        call = await opened(stub, ask(7, proposals=3))
        first = await proposals(call, 1)
        await asyncio.to_thread(gate.reached.wait, WITHIN)
        gate.open()
        several = first + await proposals(call, 2)
        assert [(one.round, one.index, one.base_length) for one in several] == [(7, 0, 20), (7, 1, 24), (7, 2, 28)]
        ids = [id_ for one in several for id_ in one.token_ids]
        assert len(ids) == 12
        await call.write(ask(8, ids[:3], most=12))
        [again] = await proposals(call, 1)
        assert again.token_ids[:9] == ids[3:]
        assert (again.round, again.base_length) == (8, 23)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() == grpc.StatusCode.OK

    conversation(servicer, talk)


def test_a_further_ask_ends_the_pushes_of_the_last_one(servicer, gate):
    """It is read while they are being made, and what comes behind its answer is its own."""
    gate.left = 5

    async def talk(stub):
        call = await opened(stub, ask(1, proposals=16))
        [first] = await proposals(call, 1)
        await asyncio.to_thread(gate.reached.wait, WITHIN)
        await call.write(ask(2, [5], proposals=2))
        # Time for the service to read it; the engine stands still.
        await asyncio.sleep(0.05)
        gate.open()
        said = []
        while not said or said[-1].round == 1 or said[-1].index < 1:
            said += await proposals(call, 1)
        assert (first.round, first.index) == (1, 0)
        assert len([one for one in said if one.round == 1]) < 15
        assert [(one.round, one.index, one.base_length) for one in said[-2:]] == [(2, 0, 21), (2, 1, 25)]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

    conversation(servicer, talk)


def test_asks_without_waiting_are_answered_in_order(servicer):
    """Every ask gets its first proposal, also when the next one is there already, and when no more will come."""

    async def talk(stub):
        call = await opened(stub, *(ask(round_, proposals=2) for round_ in range(1, 9)))
        await call.done_writing()
        said = []
        while (response := await call.read()) is not grpc.aio.EOF:
            said.append(response.proposal)
        assert [one.round for one in said if one.index == 0] == list(range(1, 9))
        assert [one.round for one in said] == sorted(one.round for one in said)
        # Nobody asked any more after the last one: it is answered in full.
        assert [one.index for one in said if one.round == 8] == [0, 1]

    conversation(servicer, talk)


def test_a_turn_on_the_same_stream(servicer):
    """A further start ends what was asked, is answered as the first one was, and begins from its own tokens."""

    async def talk(stub):
        fresh = await opened(stub, ask())
        [expected] = await proposals(fresh, 1)
        await fresh.done_writing()
        call = stub.Propose()
        for request in (start(random_ids(50, seed=9)), ask(1, at=50, proposals=16), start(), ask(2)):
            await call.write(request)
        kinds, said = [], []
        while not said or said[-1].round != 2:
            response = await call.read()
            kinds.append(response.WhichOneof("message"))
            said += [response.proposal] if response.HasField("proposal") else []
        assert kinds.count("started") == 2
        assert said[-1].token_ids == expected.token_ids
        call.cancel()
        fresh.cancel()

    conversation(servicer, talk)


@pytest.mark.parametrize("source", [common_pb2.SOURCE_MODEL, common_pb2.SOURCE_NGRAM])
def test_every_turn_says_whose_ids_these_are(servicer, source):
    """The fingerprint of ModelInfo, from the process that answers, in a session's first turn and in later ones."""

    async def talk(stub):
        info = (await stub.GetModelInfo(draft_pb2.DraftServiceGetModelInfoRequest())).info
        call = stub.Propose()
        for _ in range(2):
            await call.write(start(proposer=source))
            started = (await call.read()).started
            assert started.proposer == source
            assert started.fingerprint == info.fingerprint
            assert started.fingerprint.vocabulary_size > 0
        call.cancel()

    conversation(servicer, talk)


def test_early_ends_and_confidence(servicer):
    """The least confidence reaches the engine, and what it computed the client."""

    async def talk(stub):
        call = await opened(stub, ask(1, most=8), ask(2, most=8, min_confidence=0.95, proposals=2))
        plain, careful, more = await proposals(call, 3)
        assert not plain.confidence
        assert 1 <= len(careful.token_ids) < 8
        assert len(careful.confidence) == len(careful.token_ids)
        assert more.base_length == 20 + len(careful.token_ids)
        count = len(careful.token_ids)
        assert plain.token_ids[: count + 1] == [*careful.token_ids, more.token_ids[0]]
        call.cancel()

    conversation(servicer, talk)


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"proposals": 17}, "ask.proposals"), ({"min_confidence": 1.5}, "ask.min_confidence"), ({"at": 90}, "ask.from_")],
)
def test_a_bad_ask_ends_the_stream_by_name(servicer, fields, field):
    """Also in the middle of pushes."""

    async def talk(stub):
        call = await opened(stub, ask(proposals=16), ask(**fields))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await proposals(call, 17)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert field in error.value.details()

    conversation(servicer, talk)


@pytest.mark.parametrize("moment", ["prefill", "proposal", "pushes", "ahead"])
def test_cancelled_at_any_moment(servicer, gate, moment):
    """The slot is free at once, while the engine is still in a step; the neighbour's proposals are what they would
    have been, and so are the next owner's."""
    gate.left = {"prefill": 1000, "proposal": 2, "pushes": 5, "ahead": 13}[moment]

    async def talk(stub):
        prompt = random_ids(MAX_LENGTH - 40, seed=4) if moment == "prefill" else PROMPT
        pushed = 3 if moment == "pushes" else 1
        call = stub.Propose()
        await call.write(start(prompt))
        await call.write(ask(at=len(prompt), proposals=pushed))
        await call.read()
        if moment == "prefill":
            gate.left = 0
        elif moment != "proposal":
            await call.read()
        await asyncio.to_thread(gate.reached.wait, WITHIN if moment != "ahead" else 0.3)
        staying = await opened(stub, ask(3))
        call.cancel()
        while servicer._engine.pool.in_use > 1:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.001)
        arriving = await opened(stub, ask(4))
        gate.open()
        [one], [other] = await proposals(staying, 1), await proposals(arriving, 1)
        assert one.token_ids == other.token_ids
        for stream in (staying, arriving):
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
        fresh = await opened(stub, ask(5))
        [expected] = await proposals(fresh, 1)
        fresh.cancel()
        assert one.token_ids == expected.token_ids

    conversation(servicer, talk)


class Recorder:
    """A proposer that answers nothing until it is told to."""

    source, max_length, length = common_pb2.SOURCE_MODEL, 0, 20

    def __init__(self):
        self.begun, self.asked = 0, []

    def begin(self, turn):
        self.begun += 1

    async def settled(self):
        pass

    def ask(self, ask, deliver):
        self.asked.append((ask, deliver))


def test_a_client_that_does_not_read():
    """No request is looked at before the first answer to the one before it has been sent: nothing piles up."""

    async def requests():
        for round_ in (1, 2):
            yield ask(round_, proposals=2)

    async def run():
        proposer = Recorder()
        stream = _Stream(proposer, None)
        reading = asyncio.create_task(stream.read(Turn(PROMPT, 20), requests()))
        started = await stream.next()
        await asyncio.sleep(0.01)
        assert (proposer.begun, proposer.asked) == (1, [])
        stream.sent(started)
        for asked in (1, 2):
            await asyncio.sleep(0.01)
            assert len(proposer.asked) == asked
            for index in (0, 1):
                proposer.asked[-1][1](Timed(index, 20, Proposal([5]), 0, 0))
            # Both are there; the further one that nobody takes does not count.
            first = await stream.next()
            assert (first.proposal.round, first.proposal.index) == (asked, 0)
            assert len(proposer.asked) == asked
            stream.sent(first)
            assert (await stream.next()).proposal.index == 1
        await reading
        assert await stream.next() is None

    asyncio.run(run())


def test_prompt_lookup_on_the_same_service(servicer):
    """A session may ask for it, and gets several proposals too."""

    async def talk(stub):
        call = stub.Propose()
        await call.write(start([1, 2, 3, 4, 5, 6, 1, 2], proposer=common_pb2.SOURCE_NGRAM))
        await call.write(ask(at=8, most=2, proposals=2))
        assert (await call.read()).started.proposer == common_pb2.SOURCE_NGRAM
        assert [list(one.token_ids) for one in await proposals(call, 2)] == [[3, 4], [5, 6]]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

    conversation(servicer, talk)
