"""What goes wrong for one session stays with it, and a session that was forgotten ends: seen through the servicer."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch
from structlog.testing import capture_logs

from specpair import errors
from specpair.v1 import common_pb2
from specpair_runtime.serving import ServiceStatus

from ..failing import failure
from ..tiny import random_ids
from .served import PROMPT, ask, conversation, load, opened, proposals, start

SLOTS = 3
# Nobody else gets as far as the victim begins.
VICTIM = random_ids(200)
OTHERS = [PROMPT, random_ids(60)]
BEYOND = 128

MEMORY = (errors.OverloadedError, "OUT_OF_MEMORY")
FAILURE = (errors.InternalError, "ENGINE_FAILED")
NOT_FINITE = (errors.InternalError, "NON_FINITE_LOGITS")
CASES = [
    pytest.param({"error": torch.OutOfMemoryError("CUDA out of memory.")}, MEMORY, id="allocator"),
    pytest.param({"error": RuntimeError("CUDA error: out of memory")}, MEMORY, id="driver"),
    pytest.param({"error": RuntimeError("the size of tensor a must match")}, FAILURE, id="other"),
    pytest.param({"value": torch.nan}, NOT_FINITE, id="nan"),
]


@pytest.fixture(scope="module")
def servicer(tiny):
    servicer = load(tiny, slots=SLOTS)
    yield servicer
    servicer.stop()


@pytest.fixture(autouse=True)
def quiet():
    """Tracebacks with all their variables take longer than the tests."""
    with capture_logs():
        yield


def inject(monkeypatch, runner, *, error=None, value=None, since=BEYOND):
    """A fault in forward passes of whoever is beyond the others, from a position on."""
    logits, prefill = runner.logits, runner.prefill

    def stepping(first_slot, token_ids, starts, length):
        rows = [row for row, at in enumerate(starts.tolist()) if since <= at < runner.parking]
        if rows and error is not None:
            raise error
        result = logits(first_slot, token_ids, starts, length)
        if rows and value is not None:
            result = result.clone()
            result[rows] = value
        return result

    def prefilling(slot, token_ids, start):
        if error is not None and start >= since:
            raise error
        return prefill(slot, token_ids, start)

    monkeypatch.setattr(runner, "logits", stepping)
    monkeypatch.setattr(runner, "prefill", prefilling)


async def proposed(stub, ids):
    """What a prompt gets proposed, in two rounds of which the first comes true."""
    call = stub.Propose()
    await call.write(start(ids))
    await call.write(ask(1, at=len(ids)))
    await call.read()
    [first] = await proposals(call, 1)
    await call.write(ask(2, first.token_ids, at=len(ids)))
    [second] = await proposals(call, 1)
    call.cancel()
    return [*first.token_ids, *second.token_ids]


@pytest.mark.parametrize("since", [BEYOND, len(VICTIM) + 2], ids=["at its prompt", "at its guesses"])
@pytest.mark.parametrize(("fault", "expected"), CASES)
def test_a_fault_ends_one_session_alone(servicer, monkeypatch, fault, expected, since):
    """The victim's client gets the status and the reason, those beside it and the next ones on every slot the proposals
    that they get without the fault."""

    async def undisturbed(stub):
        return await asyncio.gather(*(proposed(stub, ids) for ids in (VICTIM, *OTHERS)))

    async def talk(stub):
        own, *others = await undisturbed(stub)
        with monkeypatch.context() as patch:
            inject(patch, servicer._engine.model.runner, **fault, since=since)
            call = stub.Propose()
            await call.write(start(VICTIM))
            await call.write(ask(1, at=len(VICTIM), most=8))
            error, *said = await asyncio.gather(failure(call), *(proposed(stub, ids) for ids in OTHERS))
            assert (type(error), error.reason) == expected
            assert "CUDA" not in str(error)
            assert said == others
        for _ in range(SLOTS):
            assert await undisturbed(stub) == [own, *others]

    conversation(servicer, talk)


def test_a_device_that_is_lost_ends_the_service(tiny, monkeypatch):
    """An error behind which a device refuses everything ends the service, and every session as unavailable."""
    status = ServiceStatus()
    lost = load(tiny, status)

    async def talk(stub):
        call = await opened(stub)
        error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        inject(monkeypatch, lost._engine.model.runner, error=error, since=0)
        await call.write(ask())
        assert isinstance(await failure(call), errors.UnavailableError)
        assert status.phase == common_pb2.PHASE_FAILED
        call = stub.Propose()
        await call.write(start(PROMPT))
        assert isinstance(await failure(call), errors.UnavailableError)

    try:
        conversation(lost, talk)
    finally:
        lost.stop()


def test_silent_streams_end(tiny):
    """A stream without a first message, one without an ask, and one silent after a proposal end as expired; one whose
    client asks in time does not."""
    impatient = load(tiny, slots=3, idle_timeout=3.0)

    async def busy(stub):
        call = await opened(stub)
        began = time.monotonic()
        round_ = 0
        while time.monotonic() - began < 6.0:
            round_ += 1
            await call.write(ask(round_))
            [proposal] = await proposals(call, 1)
            assert proposal.round == round_
            await asyncio.sleep(0.1)
        call.cancel()

    async def talk(stub):
        silent = [stub.Propose(), await opened(stub), await opened(stub, ask(1, proposals=3))]
        outcomes, _ = await asyncio.gather(asyncio.gather(*map(failure, silent)), busy(stub))
        for error in outcomes:
            assert isinstance(error, errors.UnavailableError)
            assert error.reason == "SESSION_EXPIRED"

    try:
        conversation(impatient, talk)
    finally:
        impatient.stop()


@pytest.mark.parametrize("source", [common_pb2.SOURCE_MODEL, common_pb2.SOURCE_NGRAM])
def test_sessions_per_client(tiny, source):
    """A client has no more sessions than it may have, with the model and with prompt lookup."""
    limited = load(tiny, slots=3, sessions_per_client=2)

    async def one(stub):
        call = stub.Propose()
        await call.write(start(PROMPT, proposer=source))
        return call

    async def talk(stub):
        calls = [await one(stub) for _ in range(2)]
        for call in calls:
            assert (await call.read()).started.proposer == source
        error = await failure(await one(stub))
        assert (type(error), error.reason) == (errors.OverloadedError, "SESSION_LIMIT")
        assert error.retry_after > 0
        for call in calls:
            call.cancel()

    try:
        conversation(limited, talk)
    finally:
        limited.stop()
