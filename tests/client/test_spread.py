"""Laws of addresses that stand for several servers: what goes where, over gRPC on the loopback interface."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count

import grpc
import pytest
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse

from specpair import (
    Credentials,
    SamplingParams,
    SpeculativeClient,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from specpair.grpc_transports import GrpcTarget

from ..certificates import Authority
from ..e2e.processes import wait_for
from .fakes import continuation
from .loopback import DraftServicer, TargetServicer, serving

PROMPT = (3, 4, 5)
COUNT = 30
PARAMS = SamplingParams(max_new_tokens=COUNT, seed=7)
EXPECTED = continuation(PROMPT, COUNT, 7)
MODES = ["ngram", "none"]
# Seconds in which a change of health is noticed, generously.
_NOTICED = 30


class Target(TargetServicer):
    """Counts its sessions of both kinds."""

    sessions = 0

    def Verify(self, requests, context):
        self.sessions += 1
        return super().Verify(requests, context)

    def Generate(self, request, context):
        self.sessions += 1
        return super().Generate(request, context)


class Draft(DraftServicer):
    """Counts its sessions."""

    sessions = 0

    def Propose(self, requests, context):
        self.sessions += 1
        return super().Propose(requests, context)


@dataclass
class Server:
    """A service, and what it says of its health."""

    service: Target | Draft
    health: HealthServicer = field(default_factory=HealthServicer)
    stack: ExitStack = field(default_factory=ExitStack)
    address: str = ""

    def __post_init__(self):
        self.serves(True)

    def start(self):
        """Serves, again where it was before."""
        role = "target" if isinstance(self.service, Target) else "draft"
        listen = self.address or "127.0.0.1:0"
        self.address = self.stack.enter_context(
            serving(**{role: self.service}, listen=listen, health=self.health),
        )

    def stop(self):
        """Breaks off whatever it does."""
        self.stack.close()

    def serves(self, does):
        """Sets its health."""
        self.health.set("", HealthCheckResponse.SERVING if does else HealthCheckResponse.NOT_SERVING)


@pytest.fixture
def start():
    """Starts two servers with a service each: `start(service, service)`."""
    started = []

    def start(*services):
        servers = [Server(service) for service in services]
        for server in servers:
            server.start()
        started.extend(servers)
        return servers

    yield start
    for server in started:
        server.stop()


def listed(servers):
    """One address for all of them."""
    return "ipv4:" + ",".join(server.address for server in servers)


async def until(condition):
    """Waits for what another thread brings about."""
    await asyncio.to_thread(wait_for, condition, _NOTICED, "what was expected")


async def generate(client, times=1):
    """The token ids of generations, one after the other, all of which come to their end where they began."""
    results = [await client.generate(PROMPT, PARAMS) for _ in range(times)]
    assert [list(result.token_ids) for result in results] == [EXPECTED] * times
    return results


async def reach(client, servers):
    """Generates until every server has a session."""
    async with asyncio.timeout(_NOTICED):
        while any(server.service.sessions == 0 for server in servers):
            await generate(client)


async def healthy(client, expected):
    """Waits until the client finds its target so."""
    async with asyncio.timeout(_NOTICED):
        for _ in count():
            if (await client.healthy())[0] is expected:
                return
            await asyncio.sleep(0.01)


def added(servers, before):
    """Sessions that came since then."""
    return [server.service.sessions - known for server, known in zip(servers, before, strict=True)]


def counts(servers):
    """Sessions so far."""
    return [server.service.sessions for server in servers]


@pytest.mark.parametrize("mode", MODES)
def test_sessions_are_spread_evenly(start, mode):
    """Sessions of one client take turns at the targets of one address."""
    servers = start(Target(), Target())

    async def work():
        async with SpeculativeClient(listed(servers), mode) as client:
            await reach(client, servers)
            before = counts(servers)
            await generate(client, 10)
            return added(servers, before)

    assert asyncio.run(work()) == [5, 5]


def test_a_name_stands_for_its_addresses(start):
    """A name with the scheme of DNS is looked up, and leads to the server behind it."""
    servers = start(Target())
    port = servers[0].address.rpartition(":")[2]

    async def work():
        async with SpeculativeClient(f"dns:///localhost:{port}", "ngram") as client:
            await generate(client)

    asyncio.run(work())
    assert counts(servers) == [1]


@pytest.mark.parametrize("mode", MODES)
def test_what_does_not_serve_gets_no_session(start, mode):
    """A target that says NOT_SERVING keeps its sessions and gets no other ones, until it says that it serves."""
    servers = start(Target(delay=0.01), Target(delay=0.01))

    async def work():
        async with SpeculativeClient(listed(servers), mode) as client:
            await reach(client, servers)
            async with client.stream(PROMPT, PARAMS) as stream:
                before = counts(servers)
                await anext(stream)
                here = added(servers, before).index(1)
                servers[here].serves(False)
                async with asyncio.timeout(_NOTICED):
                    while True:
                        before = counts(servers)
                        await generate(client, 4)
                        if added(servers, before)[here] == 0:
                            break
                async for _ in stream:
                    pass
            assert list(stream.result.token_ids) == EXPECTED
            assert stream.result.stats.resumes == 0
            before = counts(servers)
            await generate(client, 4)
            assert added(servers, before)[here] == 0
            servers[here].serves(True)
            async with asyncio.timeout(_NOTICED):
                while added(servers, before)[here] == 0:
                    await generate(client)

    asyncio.run(work())


@pytest.mark.parametrize("mode", MODES)
def test_a_lost_target_costs_no_token(start, mode):
    """Sessions of a target that is gone go on at the other one, and so do all that come; then it is back in turn."""
    servers = start(Target(), Target())

    async def work():
        async with SpeculativeClient(listed(servers), mode) as client:
            await reach(client, servers)
            for server in servers:
                server.service.delay = {"ngram": 1.0, "none": 0.3}[mode]  # of which there are fewer
            running = [asyncio.create_task(generate(client)) for _ in range(8)]
            before = counts(servers)
            await until(lambda: sum(added(servers, before)) == 8)
            await asyncio.to_thread(servers[0].stop)
            for server in servers:
                server.service.delay = 0.0
            results = [(await task)[0] for task in running]
            assert sum(result.stats.resumes for result in results) == 4
            before = counts(servers)
            await generate(client, 4)
            assert added(servers, before) == [0, 4]
            await asyncio.to_thread(servers[0].start)
            async with asyncio.timeout(_NOTICED):
                while added(servers, before)[0] == 0:
                    await generate(client)

    asyncio.run(work())


def test_drafts_are_spread_and_left_alike(start):
    """Sessions take turns at the drafts of one address; one that is gone or does not serve proposes nothing more."""
    target, drafts = start(Target()), start(Draft(), Draft())

    async def work():
        async with SpeculativeClient(target[0].address, listed(drafts), lookup=False) as client:
            await reach(client, drafts)
            before = counts(drafts)
            results = await generate(client, 10)
            assert added(drafts, before) == [5, 5]
            assert {result.stats.proposer for result in results} == {"model"}
            drafts[0].serves(False)
            async with asyncio.timeout(_NOTICED):
                while True:
                    before = counts(drafts)
                    await generate(client, 4)
                    if added(drafts, before) == [0, 4]:
                        break
            drafts[0].serves(True)
            before = counts(drafts)
            async with asyncio.timeout(_NOTICED):
                while added(drafts, before)[0] == 0:
                    await generate(client)
            await asyncio.to_thread(drafts[1].stop)
            async with asyncio.timeout(_NOTICED):
                while True:
                    before = counts(drafts)
                    results = await generate(client, 4)
                    if added(drafts, before) == [4, 0] and not any(one.stats.proposer_changes for one in results):
                        break
            assert {result.stats.proposer for result in results} == {"model"}

    asyncio.run(work())


@pytest.mark.parametrize("mode", MODES)
def test_none_that_serves_is_an_error_at_once(start, mode):
    """While no server of an address serves, a client that never reached one says so, and one that did waits for it."""
    servers = start(Target(), Target())
    for server in servers:
        server.serves(False)

    async def work():
        async with SpeculativeClient(listed(servers), mode, connect_timeout=30) as client:
            with pytest.raises(UnavailableError, match="unhealthy"):
                await client.generate(PROMPT, PARAMS)
            assert not (await client.healthy())[0]
            servers[1].serves(True)
            await healthy(client, True)
            await generate(client)
            servers[1].serves(False)
            await healthy(client, False)
            waiting = asyncio.create_task(generate(client))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            servers[0].serves(True)
            await waiting
        assert counts(servers) == [1, 1]

    asyncio.run(work())


def test_certificates_of_several(tmp_path):
    """A list has no name of its own: its certificates carry `server_name`, and a wrong one is named as the cause."""
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    pair = ours.pair("target.test")
    credentials = grpc.ssl_server_credentials([(pair.key, pair.chain)])
    servers = [grpc.server(ThreadPoolExecutor(1)) for _ in range(2)]
    ports = [server.add_secure_port("127.0.0.1:0", credentials) for server in servers]

    async def asked(**given):
        target = GrpcTarget("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports), Credentials(**given))
        try:
            await target.healthy(_NOTICED)
        finally:
            await target.close()

    with ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(lambda server=server: server.stop(None).wait())
        with pytest.raises(UnsupportedError):  # the connection is up, and nobody there answers questions about health
            asyncio.run(asked(ca=ours.pem, server_name="target.test"))
        with pytest.raises(UnauthenticatedError, match="server_name"):
            asyncio.run(asked(ca=ours.pem))
        with pytest.raises(UnauthenticatedError, match="give the right one as ca"):
            asyncio.run(asked(ca=theirs.pem, server_name="target.test"))
