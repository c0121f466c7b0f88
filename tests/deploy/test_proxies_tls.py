"""The lines for TLS that stand in comments of the load balancers' configurations."""

from __future__ import annotations

import asyncio
import re

import grpc
import pytest

from specpair import Credentials, SamplingParams
from specpair.errors import SpecpairError
from specpair.grpc_transports import GrpcDraft
from specpair.messages import DraftAsk, DraftStart

from ..certificates import Authority
from ..e2e.processes import run, wait_for
from .proxies import NAMES

NAME = "specpair.test"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """Its files can be read by a load balancer's workers, which are nobody."""
    made = Authority(tmp_path_factory.mktemp("tls"), "inside")
    pair = made.pair(NAME)
    made.files(pair, "service")
    made.write("both.pem", pair.chain + pair.key)
    return made


@pytest.fixture(scope="module")
def services(launch, authority):
    """Two services with TLS, which need no model."""
    place = authority.path.parent

    def connect(address):
        trusted = grpc.ssl_channel_credentials(authority.pem)
        return grpc.secure_channel(address, trusted, options=[("grpc.ssl_target_name_override", NAME)])

    flags = ["--proposer=ngram", f"--tls-cert={place / 'service.pem'}", f"--tls-key={place / 'service-key.pem'}"]
    return [launch("draft", *flags, connect=connect) for _ in range(2)]


def haproxy(text, place):
    """The configuration with its TLS lines in force."""
    listens = re.findall(r"bind (\S+) proto h2", text)
    for listen, port in zip(listens, ("443", "444"), strict=True):
        bind = re.search(rf"# (bind :{port} ssl .*)", text)[1].replace(f":{port}", listen)
        text = text.replace(f"bind {listen} proto h2", bind)
    added = re.search(r"# With TLS to the services, add: (.*)", text)[1].replace("NAME", NAME)
    text = re.sub(r"(default-server .*)", rf"\1 {added}", text)
    return text.replace("/etc/haproxy/specpair.pem", f"{place}/both.pem").replace(
        "/etc/haproxy/ca.pem", f"{place}/ca.pem"
    )


def nginx(text, place):
    """The configuration with its TLS lines in force."""
    listens = re.findall(r"listen (127\S+) (http2.*;)", text)
    for (listen, how), port in zip(listens, ("443", "444"), strict=True):
        text = text.replace(f"listen {listen} {how}", "").replace(f"# listen {port}", f"listen {listen}")
    text = re.sub(r"# ((?:grpc_)?ssl_\w+ )", r"\1", text).replace("grpc_pass grpc:", "grpc_pass grpcs:")
    text = text.replace("grpc_ssl_name NAME;", f"grpc_ssl_name {NAME};").replace("/etc/nginx/ca.pem", f"{place}/ca.pem")
    return text.replace("/etc/nginx/specpair.crt", f"{place}/service.pem").replace(
        "/etc/nginx/specpair.key", f"{place}/service-key.pem"
    )


@pytest.mark.parametrize("name", NAMES)
def test_tls_on_both_sides(name, services, authority, balance):
    """A stream of a client that speaks TLS goes through to services that speak TLS; a plain client gets nowhere."""
    edit = {"haproxy": haproxy, "nginx": nginx}[name]
    addresses = [service.address for service in services]
    proxy = balance(name, *addresses, drafts=addresses, edit=lambda text: edit(text, authority.path.parent))

    async def propose(address, credentials):
        draft = GrpcDraft(address, credentials)
        try:
            async with asyncio.timeout(30):
                assert await draft.healthy(10)
                stream = await draft.propose(DraftStart((1, 2, 3, 1, 2), SamplingParams()), 10)
                await stream.receive()
                await stream.send(DraftAsk(1, 5, (), 2))
                proposal = await stream.receive()
                stream.cancel()
                return proposal.token_ids
        finally:
            await draft.close()

    for address in (proxy.address, proxy.draft_address):
        assert run(propose(address, Credentials(ca=authority.pem, server_name=NAME))) == (3, 1)
    if name == "haproxy":
        servers = [f"{kind}s/{kind}-{n}" for kind in ("target", "draft") for n in (1, 2)]
        passed = "Health check for server {} succeeded, reason: Layer7 check passed"
        wait_for(lambda: all(passed.format(server) in proxy.text for server in servers), 20, "checks over TLS")
    with pytest.raises(SpecpairError):
        run(propose(proxy.address, None))
