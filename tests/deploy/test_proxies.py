"""HAProxy and nginx as configured in deploy/: the same tokens, sessions on both targets, streams that stay."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from specpair import SamplingParams, SpeculativeClient

from ..e2e.processes import run, wait_for
from .conftest import SLOTS

TEXTS = [
    "import os\nimport sys\n\n\ndef main():\n    ",
    "class Stack:\n    def __init__(self):\n",
    "for i in range(10):\n",
]
PARAMS = [
    SamplingParams(max_new_tokens=40, ignore_eos=True),
    SamplingParams(max_new_tokens=40, ignore_eos=True, temperature=0.9, top_p=0.95, seed=11),
]
# Seconds in which HAProxy notices a target that changes, generously.
_NOTICED = 20


async def outputs(address, draft, copies=1):
    """Results of every text with every parameters, `copies` times, all at once on one connection."""
    async with SpeculativeClient(address, draft) as client:
        wanted = [(text, params) for text in TEXTS for params in PARAMS] * copies
        return await asyncio.gather(*(client.generate(text, params) for text, params in wanted))


def verified(target):
    """Ended Verify calls by the target's log."""
    return [entry for entry in target.entries() if str(entry.get("method")).endswith("/Verify") and "rounds" in entry]


def changes(proxy):
    """What HAProxy has logged of its targets, such as "target-1 is DOWN", in order and each change once."""
    found, last = [], {}
    for server, state in re.findall(r"^Server targets/(target-\d) is (UP|DOWN)\b", proxy.text, re.MULTILINE):
        # A server that is up says so again at the end of its slow start.
        if last.get(server) != state:
            found.append(f"{server} is {state}")
        last[server] = state
    return found


@pytest.fixture(scope="module")
def direct(targets):
    """Token ids of every generation, asked of a target itself."""
    return [result.token_ids for result in run(outputs(targets[0].address, "none"))]


@pytest.mark.parametrize("draft", ["ngram", "none"])
def test_same_tokens(proxy, direct, draft):
    """What comes through a load balancer is what the target says, greedy and sampled."""
    results = run(outputs(proxy.address, draft))
    assert [result.token_ids for result in results] == direct
    assert {result.stats.resumes for result in results} == {0}


def test_both_targets_and_one_stream_each(proxy, targets, direct):
    """Sessions at once go to both targets, and each is one stream at one of them from its first round to its last."""
    before = [len(verified(target)) for target in targets]
    results = run(outputs(proxy.address, "ngram", copies=2))
    assert [result.token_ids for result in results] == direct * 2
    wait_for(lambda: _ended(targets, before) == len(results), 10, "every call logged")
    calls = [verified(target)[known:] for target, known in zip(targets, before, strict=True)]
    assert min(len(of_target) for of_target in calls) >= len(results) // 4
    # One call for each session, with all of its tokens: where it began it ended.
    assert {entry["output_tokens"] for of_target in calls for entry in of_target} == {PARAMS[0].max_new_tokens}
    assert len({entry["session_id"] for of_target in calls for entry in of_target}) == len(results)
    for target in targets:
        target.wait_until_free()


def test_more_streams_than_slots_on_one_connection(proxy, direct, targets):
    """One client's sessions beyond every slot wait at the targets for their turn, and all of them finish."""
    copies = 2 + 2 * SLOTS // len(direct)
    results = run(outputs(proxy.address, "ngram", copies=copies))
    assert len(results) > 2 * SLOTS
    assert [result.token_ids for result in results] == direct * copies


def test_turns_stay_on_their_target(proxy, targets):
    """A session's second turn finds the cache of its first, whatever the other target is doing meanwhile."""
    turns = ["def area(r):\n", "def volume(r):\n"]

    async def talk(address):
        async with SpeculativeClient(address, "ngram") as client, client.session() as session:
            results = [await session.generate(turns[0], PARAMS[0])]
            async with SpeculativeClient(address, "ngram") as other:
                await asyncio.gather(*(other.generate(text, PARAMS[0]) for text in TEXTS))
            return [*results, await session.generate(turns[1], PARAMS[0])]

    through = run(talk(proxy.address))
    alone = run(talk(targets[0].address))
    assert [result.token_ids for result in through] == [result.token_ids for result in alone]
    assert [result.stats.resumes for result in through] == [0, 0]
    assert through[1].stats.cached_tokens == alone[1].stats.cached_tokens > 0


@pytest.mark.parametrize("side", ["address", "draft_address"])
def test_clients_that_vanish(proxy, side):
    """Whoever is silent for a minute is asked whether it is there: to the services it is the load balancer that is."""
    host, _, port = getattr(proxy, side).rpartition(":")

    with socket.create_connection((host, int(port))) as client:
        ours = client.getsockname()[1]

        def asks():
            """Hundredths of seconds until the kernel asks, of the load balancer's end of the connection."""
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
                _, local, remote, _, _, timer, *_ = line.split()
                if [int(end.partition(":")[2], 16) for end in (local, remote)] == [int(port), ours]:
                    kind, _, left = timer.partition(":")
                    return int(left, 16) if kind == "02" else None
            return None

        assert wait_for(asks, 10, "TCP's keepalive") <= 60 * 100


def test_haproxy_reads_health(balance):
    """HAProxy's check is grpc.health.v1: SERVING is up, NOT_SERVING is down, and so is a port that nobody serves."""
    servers, servicers = [], []
    try:
        for _ in range(2):
            server = grpc.server(ThreadPoolExecutor(2))
            servicer = health.HealthServicer()
            health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
            servers.append((server, server.add_insecure_port("127.0.0.1:0")))
            servicers.append(servicer)
            server.start()
        servicers[1].set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        proxy = balance("haproxy", *(f"127.0.0.1:{port}" for _, port in servers))

        def said(change, times=1):
            wait_for(lambda: changes(proxy).count(change) == times, _NOTICED, change)

        said("target-2 is DOWN")
        servicers[1].set("", health_pb2.HealthCheckResponse.SERVING)
        said("target-2 is UP")
        servicers[1].set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        said("target-2 is DOWN", 2)
        assert "target-1 is DOWN" not in changes(proxy)
        servers[0][0].stop(None).wait()
        said("target-1 is DOWN")
    finally:
        for server, _ in servers:
            server.stop(None).wait()


def test_haproxy_leaves_out_what_does_not_answer(balance, targets, direct):
    """A target that hangs gets no session once its health does not answer, and gets sessions again when it does."""
    proxy = balance("haproxy", *(target.address for target in targets))
    targets[1].send(signal.SIGSTOP)
    try:
        wait_for(lambda: "target-2 is DOWN" in changes(proxy), _NOTICED, "the target that hangs is left out")
        results = run(outputs(proxy.address, "ngram"))
        assert [result.token_ids for result in results] == direct
    finally:
        targets[1].send(signal.SIGCONT)
    wait_for(lambda: "target-2 is UP" in changes(proxy), _NOTICED, "the target is back")
    known = len(verified(targets[1]))
    results = run(outputs(proxy.address, "ngram", copies=2))
    assert [result.token_ids for result in results] == direct * 2
    wait_for(lambda: len(verified(targets[1])) > known, 10, "sessions at the target that is back")


def _ended(targets, before):
    return sum(len(verified(target)) - known for target, known in zip(targets, before, strict=True))
