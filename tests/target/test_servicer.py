"""The target's streams: who gets a slot, and that it is free again whatever ends the stream."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import grpc
import pytest

from specpair import errors
from specpair.v1 import common_pb2, target_pb2
from specpair_draft.config import DraftConfig
from specpair_target import servicer as servicer_module
from specpair_target.config import TargetConfig
from specpair_target.prompts import Prompts

from ..tiny import random_ids
from . import served
from .served import WITHIN, block, conversation, failure, generated, opened, prompt, start

SHORT = random_ids(20)
LONG = random_ids(300)


@pytest.fixture(scope="module")
def servicer(tiny):
    """Two slots, no tokenizer."""
    one = served.load(tiny, "llama", queue=3, queue_timeout=20.0)
    yield one
    one.stop()


@pytest.fixture(scope="module")
def reader(tiny):
    """Two slots and a tokenizer."""
    one = served.load(tiny, "llama-text")
    yield one
    one.stop()


class Gate:
    """Stops whoever calls `owner.name` until it is opened."""

    def __init__(self, monkeypatch, owner, name):
        self._inner = getattr(owner, name)
        self.reached, self._open = threading.Event(), threading.Event()
        gate = self

        def wait(*args, **options):
            gate.reached.set()
            assert gate._open.wait(WITHIN)
            return gate._inner(*args, **options)

        monkeypatch.setattr(owner, name, wait)

    async def wait(self):
        assert await asyncio.to_thread(self.reached.wait, WITHIN)

    def open(self):
        self._open.set()


# --- a slot's end ----------------------------------------------------------------------------------------------------


def test_cancelled_while_queued(servicer):
    """Who waits for a slot and goes is forgotten: the next one gets the slot."""

    async def talk(stub):
        holders = [await opened(stub, SHORT) for _ in range(2)]
        gone = [stub.Verify() for _ in range(2)]
        for call in gone:
            await call.write(start(SHORT))
        while len(servicer._engine.pool._waiting) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        for call in gone:
            call.cancel()
        stays = asyncio.create_task(generated(stub, SHORT, 3))
        for holder in holders:
            holder.cancel()
        assert len(await stays) == 3

    conversation(servicer, talk)


@pytest.mark.parametrize("way", ["cancel", "deadline", "half-close"])
def test_gone_while_prefilling(servicer, monkeypatch, way):
    """A session whose client goes during its prefill frees its slot before the prefill is over."""
    gate = Gate(monkeypatch, servicer._engine.model.runner, "prefill")

    async def talk(stub):
        call = await opened(stub, LONG, **({"timeout": 2.0} if way == "deadline" else {}))
        await gate.wait()
        if way == "cancel":
            call.cancel()
        elif way == "half-close":
            await call.done_writing()
        await served.free(servicer)
        gate.open()
        assert len(await generated(stub, SHORT, 3)) == 3

    conversation(servicer, talk)


@pytest.mark.parametrize("turn", ["first", "later"])
def test_gone_while_tokenizing(reader, monkeypatch, turn):
    """A session whose client goes while its prompt is tokenized, in a thread that nothing stops, has no slot."""

    async def talk(stub):
        text = common_pb2.Prompt(text="def f(x):")
        if turn == "later":
            call = stub.Verify()
            one = common_pb2.SamplingParams(max_new_tokens=1)
            await call.write(
                target_pb2.VerifyRequest(start=target_pb2.SessionStart(prompt=text, sampling=one)),
            )
            length = (await call.read()).started.length
            await call.write(block(length))
            assert (await call.read()).verdict.committed.finish_reason
        gate = Gate(monkeypatch, Prompts, "of_text")
        if turn == "later":
            await call.write(target_pb2.VerifyRequest(extend=target_pb2.SessionExtend(prompt=text)))
        else:
            call = stub.Generate(target_pb2.GenerateRequest(prompt=text))
        await gate.wait()
        assert reader._engine.pool.in_use == (turn == "later")
        call.cancel()
        await served.free(reader)
        gate.open()
        await asyncio.sleep(0.05)
        assert reader._engine.pool.in_use == 0

    conversation(reader, talk)


@pytest.mark.parametrize("method", ["verify", "generate"])
def test_gone_while_computing(servicer, monkeypatch, method):
    """A client that goes during a step, with further blocks waiting, frees its slot before the step is over."""
    gate = Gate(monkeypatch, servicer._engine.model.runner, "logits")

    async def talk(stub):
        if method == "verify":
            call = await opened(stub, SHORT, *(block(len(SHORT), round_=number) for number in range(4)))
        else:
            call = stub.Generate(target_pb2.GenerateRequest(prompt=prompt(SHORT)))
        await gate.wait()
        await asyncio.sleep(0.05)
        call.cancel()
        await served.free(servicer)
        gate.open()
        assert len(await generated(stub, SHORT, 3)) == 3

    conversation(servicer, talk)


@pytest.mark.parametrize("place", ["verdict", "started", "committed_message"])
def test_a_handler_that_fails(servicer, monkeypatch, place):
    """An exception anywhere in the handler ends the stream as INTERNAL and frees the slot."""

    def fail(*args):
        raise ZeroDivisionError

    async def talk(stub):
        with monkeypatch.context() as patch:
            patch.setattr(servicer_module.wire, place, fail)
            if place == "committed_message":
                call = stub.Generate(target_pb2.GenerateRequest(prompt=prompt(SHORT)))
            else:
                call = stub.Verify()
                await call.write(start(SHORT))
                await call.write(block(len(SHORT)))
            error, _ = await failure(call)
            assert isinstance(error, errors.InternalError)
        assert len(await generated(stub, SHORT, 3)) == 3

    conversation(servicer, talk)


@pytest.mark.parametrize(
    "bad",
    [
        target_pb2.VerifyRequest(),
        start(SHORT),
        block(20, ids=list(range(8))),
        block(20, ids=[10**6]),
        target_pb2.VerifyRequest(extend=target_pb2.SessionExtend(prompt=prompt(SHORT))),
    ],
    ids=["empty", "second start", "too long", "no id", "extend in a turn"],
)
def test_a_bad_message_ends_the_stream(servicer, bad):
    """A message that cannot be read, or comes at the wrong time, ends the stream and frees the slot."""

    async def talk(stub):
        call = await opened(stub, SHORT, bad)
        error, _ = await failure(call)
        assert isinstance(error, (errors.InvalidRequestError, errors.ProtocolError))

    conversation(servicer, talk)


# --- who gets a slot -------------------------------------------------------------------------------------------------


def test_overload_says_why_and_when_to_come_back(servicer):
    """A session that gets no slot in its time, or finds the queue full, learns the reason and after how long another
    try makes sense, in the status details and in the metadata that gRPC's own retries read."""

    async def talk(stub):
        holders = [await opened(stub, SHORT) for _ in range(2)]
        waiting = [stub.Verify(metadata=[("name", "a")]) for _ in range(3)]
        for call in waiting:
            await call.write(start(SHORT))
        while len(servicer._engine.pool._waiting) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        error, metadata = await failure(
            stub.Generate(target_pb2.GenerateRequest(prompt=prompt(SHORT)), metadata=[("name", "a")])
        )
        assert (type(error), error.reason) == (errors.OverloadedError, "QUEUE_FULL")
        assert error.retry_after > 0
        assert int(metadata["grpc-retry-pushback-ms"]) == round(error.retry_after * 1000)
        # Another client has its place all the same, and is told when its time is up.
        error, metadata = await failure(
            stub.Generate(target_pb2.GenerateRequest(prompt=prompt(SHORT)), metadata=[("name", "b")], timeout=0.3)
        )
        assert type(error) in (errors.DeadlineError, errors.OverloadedError)
        for call in (*holders, *waiting):
            call.cancel()

    conversation(servicer, talk)


def test_nothing_is_tokenized_for_who_is_refused(reader, monkeypatch):
    """A session that cannot have a slot is refused before any work is done for it."""

    async def talk(stub):
        monkeypatch.setattr(reader._engine.pool, "_max_waiting", 0)
        holders = [await opened(stub, [1, 2, 3]) for _ in range(2)]
        monkeypatch.setattr(Prompts, "of_text", None)
        error, _ = await failure(stub.Generate(target_pb2.GenerateRequest(prompt=common_pb2.Prompt(text="x"))))
        assert error.reason == "QUEUE_FULL"
        for call in holders:
            call.cancel()

    conversation(reader, talk)


def test_no_client_starves_the_others(servicer):
    """Sessions of a client that floods the service and those of one that asks once at a time: the latter waits for one
    turn of each, not for the flood."""
    order = []

    async def speaks(stub, name):
        await generated(stub, SHORT, 2, metadata=[("name", name)])
        order.append(name)

    async def floods(stub):
        while "modest" not in order:
            with contextlib.suppress(grpc.RpcError):
                await speaks(stub, "flood")
            await asyncio.sleep(0)

    async def talk(stub):
        holders = [await opened(stub, SHORT) for _ in range(2)]
        floods_ = [asyncio.create_task(floods(stub)) for _ in range(20)]
        while len(servicer._engine.pool._waiting) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        modest = asyncio.create_task(speaks(stub, "modest"))
        while not servicer._engine.pool._waiting.count("modest"):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        for holder in holders:
            holder.cancel()
        await modest
        assert order.index("modest") <= 2 + 2
        await asyncio.gather(*floods_)

    conversation(servicer, talk)


def test_sessions_per_client(tiny):
    """A client with as many sessions as it may have is refused as such; another one is not."""
    limited = served.load(tiny, "llama", slots=3, sessions_per_client=1)

    async def talk(stub):
        mine = await opened(stub, SHORT, metadata=[("name", "mine")])
        error, _ = await failure(
            stub.Generate(target_pb2.GenerateRequest(prompt=prompt(SHORT)), metadata=[("name", "mine")])
        )
        assert (type(error), error.reason) == (errors.OverloadedError, "SESSION_LIMIT")
        assert len(await generated(stub, SHORT, 3, metadata=[("name", "other")])) == 3
        # Without names the address counts, which is another identity still.
        assert len(await generated(stub, SHORT, 3)) == 3
        mine.cancel()
        await served.free(limited)
        assert len(await generated(stub, SHORT, 3, metadata=[("name", "mine")])) == 3

    try:
        conversation(limited, talk)
    finally:
        limited.stop()


@pytest.mark.parametrize("config", [TargetConfig, DraftConfig])
def test_the_limit_is_an_option_of_both_services(config, capsys):
    """`--sessions-per-client` is off by default, and no number of sessions is below none."""
    assert config.parse(["--model=x"]).sessions_per_client == 0
    assert config.parse(["--model=x", "--sessions-per-client=3"]).sessions_per_client == 3
    with pytest.raises(SystemExit):
        config.parse(["--model=x", "--sessions-per-client=-1"])
    assert capsys.readouterr().err.startswith("error: sessions_per_client: ")


# --- clients that do nothing -----------------------------------------------------------------------------------------


IDLE = 2.0


@pytest.fixture(scope="module")
def impatient(tiny):
    """Streams may lie idle for a short time."""
    one = served.load(tiny, "llama", idle_timeout=IDLE)
    yield one
    one.stop()


def is_expired(error):
    return isinstance(error, errors.UnavailableError) and error.reason == "SESSION_EXPIRED"


def test_silent_streams_end(impatient):
    """A stream without a first message, one without a block, and one silent after a verdict end as expired."""

    async def talk(stub):
        calls = [stub.Verify(), await opened(stub, SHORT), await opened(stub, SHORT, block(len(SHORT)))]
        began = time.monotonic()
        outcomes = await asyncio.gather(*map(failure, calls))
        assert all(is_expired(error) for error, _ in outcomes), outcomes
        assert time.monotonic() - began >= 0.9 * IDLE

    conversation(impatient, talk)


def test_no_time_counts_while_the_service_is_at_work(impatient, monkeypatch):
    """A client that waits for a verdict longer than streams may lie idle is not idle; afterwards its time begins."""
    gate = Gate(monkeypatch, impatient._engine.model.runner, "logits")

    async def talk(stub):
        call = await opened(stub, SHORT, block(len(SHORT)))
        await gate.wait()
        await asyncio.sleep(2 * IDLE)
        assert impatient._engine.pool.in_use == 1
        gate.open()
        verdict = (await call.read()).verdict
        assert verdict.accepted == 0
        await asyncio.sleep(IDLE / 4)
        await call.write(block(len(SHORT) + 1))
        assert (await call.read()).verdict.base_length == len(SHORT) + 1
        error, _ = await failure(call)
        assert is_expired(error)

    conversation(impatient, talk)


# A connection on which little is on its way before somebody has to read it.
NARROW = {"grpc.http2.lookahead_bytes": 65_536, "grpc.http2.bdp_probe": 0}


def test_a_client_that_never_reads(impatient):
    """A generation whose client reads nothing stops where gRPC's flow control stops it, costs the others nothing, and
    ends as expired: its slot is free although the client is still there."""

    async def talk(stub):
        params = {
            "sampling": common_pb2.SamplingParams(),
            "logprobs": common_pb2.LogprobsOptions(enabled=True, top_n=20),
        }
        stuck = [stub.Generate(target_pb2.GenerateRequest(prompt=prompt(SHORT), **params)) for _ in range(6)]
        for call in stuck:
            await call.wait_for_connection()
        neighbours = [generated(stub, SHORT, 5) for _ in range(4)]
        assert len({tuple(ids) for ids in await asyncio.gather(*neighbours)}) == 1
        await served.free(impatient)
        # Who reads in the end learns why.
        for error, _ in await asyncio.gather(*map(failure, stuck)):
            assert is_expired(error)

    conversation(impatient, talk, patience=IDLE, **NARROW)


def test_blocks_of_a_client_that_never_reads_are_bounded(servicer, monkeypatch):
    """However many blocks a client sends without reading a verdict, only so many are taken as answers fit in between:
    what it sends beyond stays with it, and a neighbour goes on as before."""
    taken = []
    submit = servicer._engine.submit
    monkeypatch.setattr(servicer._engine, "submit", lambda *args: taken.append(1) or submit(*args))

    async def talk(stub):
        expected = await generated(stub, SHORT, 5)
        call = await opened(stub, SHORT)

        async def flood():
            for number in range(200_000):
                await call.write(block(0, round_=number, ids=[1] * 7))

        flooding = asyncio.create_task(flood())
        last = -1
        while len(taken) != last:
            last = len(taken)
            await asyncio.sleep(0.5)
        assert 32 < len(taken) < 50_000
        assert not flooding.done()
        assert await generated(stub, SHORT, 5) == expected
        flooding.cancel()
        call.cancel()

    conversation(servicer, talk, **NARROW)
