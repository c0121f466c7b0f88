"""A target whose weights two processes share: the tokens of one process, and one life and one death for both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import grpc
import pytest
from tests.tiny import random_ids

from specpair import SamplingParams, SpeculativeClient
from specpair.v1 import common_pb2

from .processes import run, script, wait_for
from .sessions import RawSession, target_stub

# Seconds that stand for "does not hang".
_SOON = 20
_TORCHRUN = [
    script("torchrun"),
    "--nproc-per-node=2",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=127.0.0.1:0",
    "--local-addr=127.0.0.1",
    "-m",
    "specpair_target",
]
# Longer than a chunk, longer than the shortest attended length, one token, and some.
_PROMPTS = [random_ids(length, seed=3) for length in (150, 270, 1, 40)]
_NEW = 24
_GREEDY = SamplingParams(max_new_tokens=_NEW)
_SAMPLED = SamplingParams(max_new_tokens=_NEW, temperature=0.9, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def services(launch, tiny):
    """One service in one process, and three in two processes each: to compare with, and to lose a part of."""
    flags = [f"--model={tiny.path('llama')}", "--dtype=fp32", "--slots=4", "--max-length=400"]
    whole = launch("target", *flags)
    return whole, [launch("target", *flags, launcher=_TORCHRUN, env={"GLOO_SOCKET_IFNAME": "lo"}) for _ in range(3)]


@pytest.fixture(scope="module")
def whole(services):
    """The service in one process."""
    return services[0]


@pytest.fixture(scope="module")
def split(services):
    """A service in two processes."""
    return services[1][0]


def processes(service):
    """Process ids of a service's two processes, rank 0 first."""
    assert service.address
    parent = service.process.pid
    found = {}
    for pid in map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found[next(int(variable[5:]) for variable in variables if variable.startswith(b"RANK="))] = pid
    assert sorted(found) == [0, 1]
    return found[0], found[1]


def gone(pid):
    """Whether a process has ended, be it that torchrun has not asked yet how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextlib.contextmanager
def left_alone(service):
    """Halts torchrun meanwhile, which would end the one process as soon as it sees that the other one has ended."""
    service.send(signal.SIGSTOP)
    try:
        yield
    finally:
        service.send(signal.SIGCONT)


def outputs(service, proposer, params):
    """What the prompts become, all of them at once."""

    async def ask():
        async with SpeculativeClient(service.address, proposer) as client:
            return await asyncio.gather(*(client.generate(prompt, params) for prompt in _PROMPTS))

    return [result.token_ids for result in run(ask())]


@pytest.mark.parametrize("params", [_GREEDY, _SAMPLED], ids=["greedy", "sampled"])
def test_two_processes_say_what_one_says(whole, split, params):
    """In fp32 several sessions at once get the tokens of one process, whoever proposes, greedy and sampled."""
    expected = outputs(whole, "none", params)
    assert [len(ids) for ids in expected] == [_NEW] * len(_PROMPTS)
    for proposer in ("none", "ngram"):
        assert outputs(split, proposer, params) == expected


def test_the_service_says_how_many_share_the_model(whole, split):
    """ModelInfo counts the processes, and describes the model as what it is together."""
    one, two = whole.info(), split.info()
    assert (one.parallel, two.parallel) == (1, 2)
    assert (one.parameters, one.fingerprint) == (two.parameters, two.fingerprint)


def test_a_session_resumes_where_it_was(whole, split):
    """Committed tokens are replayed in both processes: what follows is what would have followed."""
    expected = outputs(whole, "none", _GREEDY)

    async def resume(prompt, committed):
        async with target_stub(split.address) as stub:
            sampling = common_pb2.SamplingParams(max_new_tokens=_NEW)
            session = await RawSession.open(stub, prompt, committed=committed, sampling=sampling)
            return await session.run()

    for prompt, ids in zip(_PROMPTS, expected, strict=True):
        assert tuple(run(resume(prompt, ids[:11]))) == ids[11:]


def test_sigterm_drains_both(split):
    """SIGTERM to torchrun reaches both processes: the stream that runs is finished, rank 0 stops, and none is left."""
    pids = processes(split)

    async def under_way():
        async with target_stub(split.address) as stub:
            sampling = common_pb2.SamplingParams(max_new_tokens=60)
            session = await RawSession.open(stub, _PROMPTS[3], sampling=sampling)
            await session.send(session.block())
            split.send(signal.SIGTERM)
            await asyncio.to_thread(wait_for, lambda: "stopping" in split.text, _SOON, "rank 0 stops")
            return await session.run()

    assert len(run(under_way())) == 60
    split.wait(_SOON)
    assert all(gone(pid) for pid in pids)
    entries = list(split.entries())
    assert entries[-1]["event"] == "stopped"
    assert {entry["level"] for entry in entries} == {"info"}


def test_a_lost_follower_ends_the_service(services):
    """When rank 1 is killed, the call that runs is UNAVAILABLE and does not hang, and rank 0 ends with a failure."""
    service = services[1][1]
    leader, follower = processes(service)

    async def cut_off():
        async with target_stub(service.address) as stub:
            sampling = common_pb2.SamplingParams(max_new_tokens=200)
            session = await RawSession.open(stub, _PROMPTS[3], sampling=sampling)
            os.kill(follower, signal.SIGKILL)
            await session.run()

    with left_alone(service):
        with pytest.raises(grpc.RpcError) as caught:
            run(cut_off(), _SOON)
        wait_for(lambda: gone(leader), _SOON, "rank 0 ends")
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert service.wait(_SOON) != 0
    assert any(entry["event"].startswith("failed: ") for entry in service.entries())
    assert f"exitcode  : 1 (pid: {leader})" in service.text


def test_a_lost_leader_leaves_nobody(services):
    """When rank 0 is killed, rank 1 ends by itself, and torchrun with it."""
    service = services[1][2]
    leader, follower = processes(service)
    with left_alone(service):
        os.kill(leader, signal.SIGKILL)
        wait_for(lambda: gone(follower), _SOON, "rank 1 ends")
    assert service.wait(_SOON) != 0
    assert f"exitcode  : 1 (pid: {follower})" in service.text
