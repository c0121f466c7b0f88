"""What goes wrong for one session stays with it: seen through the servicer, with faults injected into the model."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from structlog.testing import capture_logs

from specpair import errors
from specpair.v1 import common_pb2, target_pb2
from specpair_runtime.serving import ServiceStatus
from specpair_target.config import TargetConfig
from specpair_target.servicer import TargetServicer

from ..tiny import random_ids
from . import served
from .served import block, conversation, failure, generated, opened, prompt

SLOTS = 4
NEW = 16
# Nobody else gets as far as the victim begins.
VICTIM = random_ids(200)
OTHERS = [random_ids(length, seed=5) for length in (3, 20, 60)]
BEYOND = 128


@pytest.fixture(scope="module")
def servicer(tiny):
    one = served.load(tiny, "llama", slots=SLOTS)
    yield one
    one.stop()


@pytest.fixture(autouse=True)
def quiet():
    """Tracebacks with all their variables take longer than the tests."""
    with capture_logs():
        yield


# What happens to the victim, and what its client learns.
MEMORY = (errors.OverloadedError, "OUT_OF_MEMORY")
FAILURE = (errors.InternalError, "ENGINE_FAILED")
NOT_FINITE = (errors.InternalError, "NON_FINITE_LOGITS")
RAISED = {
    "allocator": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MEMORY),
    "driver": (RuntimeError("CUDA error: out of memory"), MEMORY),
    "library": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), MEMORY),
    "cpu": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), MEMORY),
    "python": (MemoryError(), MEMORY),
    "other": (RuntimeError("the size of tensor a must match"), FAILURE),
}
SPOILED = {"nan": torch.nan, "all minus infinity": -torch.inf, "infinity": torch.inf}


class Fault:
    """Strikes in forward passes of whoever is beyond the others, from a position on, as long as it is switched on."""

    def __init__(self, monkeypatch, runner, *, error=None, value=None, since=BEYOND):
        self.on, self.struck = True, 0
        self.may = threading.Event()
        self.may.set()
        logits, prefill = runner.logits, runner.prefill

        def stepping(first_slot, token_ids, starts, length):
            rows = [row for row, at in enumerate(starts.tolist()) if since <= at < runner.parking and self.on]
            if rows:
                assert self.may.wait(served.WITHIN)
            self.struck += len(rows)
            if rows and error is not None:
                raise error
            result = logits(first_slot, token_ids, starts, length)
            if rows and value is not None:
                result = result.clone()
                result[rows] = value
            return result

        def prefilling(slot, token_ids, start):
            if self.on and error is not None and start >= since:
                assert self.may.wait(served.WITHIN)
                self.struck += 1
                raise error
            return prefill(slot, token_ids, start)

        monkeypatch.setattr(runner, "logits", stepping)
        monkeypatch.setattr(runner, "prefill", prefilling)


async def verified(stub, ids):
    """What a prompt goes on with, block by block."""
    call = await opened(stub, ids)
    said = []
    while len(said) < NEW:
        await call.write(block(len(ids) + len(said)))
        response = await call.read()
        said += response.verdict.committed.token_ids
    call.cancel()
    return said


CASES = [
    *(pytest.param({"error": error}, expected, id=f"{name}") for name, (error, expected) in RAISED.items()),
    *(pytest.param({"value": value}, NOT_FINITE, id=name) for name, value in SPOILED.items()),
]


@pytest.mark.parametrize("since", [BEYOND, len(VICTIM) + 3], ids=["at its prompt", "at its output"])
@pytest.mark.parametrize(("fault", "expected"), CASES)
def test_a_fault_ends_one_session_alone(servicer, monkeypatch, fault, expected, since):
    """The victim's client gets the status and the reason, those beside it the tokens that they get without the fault,
    and on every slot the next sessions, the victim's own prompt among them, say what they always say."""

    async def undisturbed(stub):
        return await asyncio.gather(*(generated(stub, ids, NEW) for ids in (VICTIM, *OTHERS)))

    async def talk(stub):
        own, *others = await undisturbed(stub)
        with monkeypatch.context() as patch:
            struck = Fault(patch, servicer._engine.model.runner, **fault, since=since)
            for way in ("generate", "verify"):
                if way == "generate":
                    call = stub.Generate(target_pb2.GenerateRequest(prompt=prompt(VICTIM)))
                else:
                    struck.may.clear()
                    call = await opened(stub, VICTIM, *(block(len(VICTIM) + number) for number in range(8)))
                    struck.may.set()
                (error, _), *said = await asyncio.gather(failure(call), *(verified(stub, ids) for ids in OTHERS))
                assert (type(error), error.reason) == expected
                assert "CUDA" not in str(error)
                assert said == others
            assert struck.struck
        for _ in range(SLOTS):
            assert await undisturbed(stub) == [own, *others]

    conversation(servicer, talk)


def test_a_device_that_is_lost_ends_the_service(tiny, monkeypatch):
    """An error behind which a device refuses everything is no session's own: all end as unavailable, and so does the
    service, so that something can start it again."""
    status = ServiceStatus()
    lost = TargetServicer(TargetConfig(model=tiny.path("llama"), **served.DEFAULTS), status)
    lost.load(status)

    async def talk(stub):
        error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        fault = Fault(monkeypatch, lost._engine.model.runner, error=error)
        fault.may.clear()
        call = await opened(stub, VICTIM, block(len(VICTIM)))
        fault.may.set()
        error, _ = await failure(call)
        assert isinstance(error, errors.UnavailableError)
        assert status.phase == common_pb2.PHASE_FAILED
        assert status.snapshot.detail == "the engine failed: AcceleratorError"
        error, _ = await failure(stub.Generate(target_pb2.GenerateRequest(prompt=prompt([1]))))
        assert isinstance(error, errors.UnavailableError)

    try:
        conversation(lost, talk)
    finally:
        lost.stop()
