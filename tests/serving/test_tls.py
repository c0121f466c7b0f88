"""TLS and mutual TLS: who gets a connection, what a service refuses to start with, certificates replaced under way."""

from __future__ import annotations

import asyncio
import re
import ssl
import warnings

import grpc
import pytest
import structlog
from cryptography.hazmat.primitives import serialization

from specpair.credentials import Credentials
from specpair.errors import UnauthenticatedError, UnavailableError
from specpair.grpc_transports import GrpcTarget
from specpair.v1 import common_pb2, target_pb2, target_pb2_grpc
from specpair_runtime.serving import ServiceStatus, serve
from specpair_runtime.serving.identity import current_identity

from ..certificates import Authority

HERE = ("localhost", "127.0.0.1")
# Stands for "at once": the calls themselves would take longer.
AT_ONCE = 10
PATIENCE = 60


@pytest.fixture
def ours(tmp_path):
    """The authority that everybody trusts."""
    return Authority(tmp_path, "ours")


@pytest.fixture
def theirs(tmp_path):
    """Another one, trusted by nobody."""
    return Authority(tmp_path, "theirs")


@pytest.fixture
def server(ours):
    """Settings of a service with TLS."""
    chain, key = ours.files(ours.pair(*HERE), "server")
    return {"tls_cert": str(chain), "tls_key": str(key)}


@pytest.fixture
def mutual(ours, server):
    """Settings of a service that asks for client certificates too."""
    return {**server, "tls_client_ca": str(ours.path)}


async def _info(address, credentials):
    """Asks for ModelInfo, with much patience, and does so at once."""
    target = GrpcTarget(address, credentials)
    try:
        async with asyncio.timeout(AT_ONCE):
            return await target.info(PATIENCE)
    finally:
        await target.close()


def _dialled(address, *, trust, files=None, version=None):
    """A new connection: the names in the certificate that it gets, and the version of TLS. `files` are a client's."""
    context = ssl.create_default_context(cafile=trust)
    context.set_alpn_protocols(["h2"])
    if files is not None:
        context.load_cert_chain(*files)
    if version is not None:
        context.set_ciphers("ALL:@SECLEVEL=0")  # the system's policy is not what is asked about
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of old versions
            context.minimum_version = context.maximum_version = version

    async def dial():
        host, _, port = address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        try:
            found = writer.get_extra_info("peercert")["subjectAltName"]
            return {name for _, name in found}, writer.get_extra_info("ssl_object").version()
        finally:
            writer.transport.abort()  # nobody waits for the other side's goodbye

    return dial()


def test_serves_tls_only(running, ours, server):
    """With a certificate the service speaks TLS, and nothing else on that port."""

    async def check():
        async with running(**server) as service:
            assert (await _info(service.address, Credentials(ca=ours.path))).phase
            with pytest.raises(UnavailableError, match="may want TLS"):
                await _info(service.address, None)

    asyncio.run(check())


def test_mutual_tls_names_the_caller(running, fake, monkeypatch, ours, mutual):
    """With a client CA a caller is who the certificate says it is, whatever form the files are given in."""
    seen = []

    async def told(self, request, context):
        seen.append(current_identity())
        return target_pb2.TargetServiceGetModelInfoResponse()

    monkeypatch.setattr(fake.FakeTarget, "GetModelInfo", told)
    pair = ours.pair("alice@example.org")
    chain, key = ours.files(pair, "alice")

    async def check():
        async with running(**mutual) as service:
            await _info(service.address, Credentials(ca=ours.pem, cert=pair.chain, key=pair.key))
            await _info(service.address, Credentials(ca=str(ours.path), cert=chain, key=str(key)))

    asyncio.run(check())
    assert seen == ["alice@example.org"] * 2


def test_a_caller_without_certificate_is_its_address(running, fake, monkeypatch, ours, server):
    """Without tokens and client certificates a caller is its address, the same one for all of its connections."""
    seen = set()

    async def told(self, request, context):
        seen.add(current_identity())
        return target_pb2.TargetServiceGetModelInfoResponse()

    monkeypatch.setattr(fake.FakeTarget, "GetModelInfo", told)

    async def check():
        async with running(**server) as service:
            for _ in range(2):
                await _info(service.address, Credentials(ca=ours.path))

    asyncio.run(check())
    assert seen == {"ipv4:127.0.0.1"}
    assert current_identity() == ""


def test_failed_handshakes_say_what_to_do(running, ours, theirs, mutual):
    """A connection that fails over certificates fails at once, with a typed error that names the way out."""
    good = ours.pair("alice@example.org")

    def offer(pair, ca=ours.path, **more):
        return Credentials(ca=ca, cert=pair.chain, key=pair.key, **more)

    cases = [
        (offer(good, theirs.path), UnauthenticatedError, "not from a CA that this client trusts"),
        (offer(good, server_name="elsewhere.example"), UnauthenticatedError, "for other names"),
        (Credentials(ca=ours.path), UnavailableError, "client certificate"),
        (offer(theirs.pair("alice@example.org")), UnavailableError, "client certificate"),
        (offer(ours.pair("alice@example.org", expired=True)), UnavailableError, "client certificate"),
    ]

    async def check():
        async with running(**mutual) as service:
            for credentials, kind, text in cases:
                with pytest.raises(kind, match=text):
                    await _info(service.address, credentials)
            assert (await _info(service.address, offer(good))).phase

    asyncio.run(check())


def test_an_expired_service_says_so(running, ours):
    """A service whose certificate has expired is refused with that reason, and TLS towards plain text too."""
    chain, key = ours.files(ours.pair(*HERE, expired=True), "old")

    async def check():
        async with running(tls_cert=str(chain), tls_key=str(key)) as service:
            with pytest.raises(UnauthenticatedError, match="has expired"):
                await _info(service.address, Credentials(ca=ours.path))
        async with running() as service:
            with pytest.raises(UnavailableError, match="speaks no TLS"):
                await _info(service.address, Credentials(ca=ours.path))

    asyncio.run(check())


def _broken(ours, server, name):
    """Settings that cannot be used, and the field at fault."""
    other = ours.files(ours.pair(*HERE), "other")
    junk = str(ours.write("junk.pem", b"-----BEGIN NONSENSE-----\n"))
    key = serialization.load_pem_private_key(ours.pair(*HERE).key, None)
    locked = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"word")
    )
    return {
        "no key": ({"tls_cert": server["tls_cert"]}, "tls_key: is required"),
        "no certificate": ({"tls_key": server["tls_key"]}, "tls_cert: is required"),
        "client CA alone": ({"tls_client_ca": str(ours.path)}, "tls_cert: is required"),
        "absent certificate": (
            {**server, "tls_cert": "/nowhere/c.pem"},
            "tls_cert: cannot read /nowhere/c.pem",
        ),
        "absent key": ({**server, "tls_key": "/nowhere/k.pem"}, "tls_key: cannot read"),
        "a directory": ({**server, "tls_key": str(ours.path.parent)}, "tls_key: cannot read"),
        "absent client CA": ({**server, "tls_client_ca": "/nowhere"}, "tls_client_ca: cannot read"),
        "no PEM": ({**server, "tls_cert": junk}, "tls_cert: .* holds no PEM certificate"),
        "no key in PEM": ({**server, "tls_key": junk}, "tls_key: .* no PEM private key"),
        "no CA in PEM": ({**server, "tls_client_ca": junk}, "tls_client_ca: .* holds no PEM certificate"),
        "another's key": ({**server, "tls_key": str(other[1])}, "tls_key: .* does not belong to the certificate"),
        "a password": ({**server, "tls_key": str(ours.write("locked.pem", locked))}, "tls_key: .* without a password"),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "no key",
        "no certificate",
        "client CA alone",
        "absent certificate",
        "absent key",
        "a directory",
        "absent client CA",
        "no PEM",
        "no key in PEM",
        "no CA in PEM",
        "another's key",
        "a password",
    ],
)
def test_refuses_to_start(fake, ours, server, name):
    """A service whose TLS cannot be as configured ends with status 1 and names the field, before it listens."""
    settings, message = _broken(ours, server, name)
    status = ServiceStatus()
    touched = []

    def register(server):
        target_pb2_grpc.add_TargetServiceServicer_to_server(fake.FakeTarget(status), server)
        return [fake.SERVICE]

    ended = asyncio.run(
        serve(
            fake.FakeConfig(listen="127.0.0.1:0", **settings),
            register=register,
            load=lambda status: touched.append("load"),
            status=status,
            close=lambda: touched.append("close"),
            on_listening=touched.append,
        )
    )
    assert (ended, touched) == (1, [])
    assert status.phase == common_pb2.PHASE_FAILED
    assert re.match(message, status.snapshot.detail)


def test_certificates_are_replaced_under_way(running, ours, theirs, mutual):
    """New files are in force for the next connection, client CA included; streams that run keep their connection."""
    alice = ours.files(ours.pair("alice@example.org"), "alice")
    bob = theirs.files(theirs.pair("bob@example.org"), "bob")

    async def check():
        async with running(**mutual) as service:
            roots = grpc.ssl_channel_credentials(ours.pem, alice[1].read_bytes(), alice[0].read_bytes())
            async with grpc.aio.secure_channel(service.address, roots) as channel:
                stream = target_pb2_grpc.TargetServiceStub(channel).Verify()

                async def turn(number):
                    await stream.write(target_pb2.VerifyRequest(block=target_pb2.Block(round=number)))
                    return (await stream.read()).verdict.round

                assert await turn(1) == 1
                assert (await _dialled(service.address, trust=ours.path, files=alice))[0] == set(HERE)
                with structlog.testing.capture_logs() as logs:
                    theirs_now = theirs.pair(*HERE, "renewed.example")
                    for setting, content in (
                        ("tls_cert", theirs_now.chain),
                        ("tls_key", theirs_now.key),
                        ("tls_client_ca", theirs.pem),
                    ):
                        ours.write(mutual[setting].rpartition("/")[2], content)
                    names, _ = await _dialled(service.address, trust=theirs.path, files=bob)
                assert names == {*HERE, "renewed.example"}
                assert [entry["event"] for entry in logs if "certificates" in entry["event"]] == [
                    "certificates loaded again"
                ]
                chain, key = (path.read_bytes() for path in bob)
                assert (await _info(service.address, Credentials(ca=theirs.path, cert=chain, key=key))).phase
                chain, key = (path.read_bytes() for path in alice)
                with pytest.raises(UnavailableError, match="client certificate"):
                    await _info(service.address, Credentials(ca=theirs.pem, cert=chain, key=key))
                # One that stands is not asked again.
                assert await turn(2) == 2
                await stream.done_writing()
                assert await stream.read() is grpc.aio.EOF

    asyncio.run(check())


def test_broken_certificates_change_nothing(running, ours, server):
    """Files that do not fit each other are logged once, and the pair before stays until there is a good one."""
    renewed = ours.pair(*HERE, "renewed.example")

    async def check():
        async with running(**server) as service:
            with structlog.testing.capture_logs() as logs:
                ours.write("server.pem", renewed.chain)  # the key is still to come
                for _ in range(3):
                    assert (await _dialled(service.address, trust=ours.path))[0] == set(HERE)
                (ours.path.parent / "server-key.pem").unlink()
                assert (await _dialled(service.address, trust=ours.path))[0] == set(HERE)
                ours.write("server-key.pem", renewed.key)
                assert "renewed.example" in (await _dialled(service.address, trust=ours.path))[0]
        said = [(entry["log_level"], entry["event"]) for entry in logs if "certificates" in entry["event"]]
        assert [level for level, _ in said] == ["error", "error", "info"]
        assert "tls_key" in said[0][1]
        assert "does not belong" in said[0][1]
        assert "cannot read" in said[1][1]

    asyncio.run(check())


def test_old_versions_are_refused(running, ours, server):
    """TLS 1.2 and 1.3 are spoken, nothing older."""

    async def check():
        async with running(**server) as service:
            for version, name in ((ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")):
                assert (await _dialled(service.address, trust=ours.path, version=version))[1] == name
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await _dialled(service.address, trust=ours.path, version=ssl.TLSVersion.TLSv1_1)

    asyncio.run(check())


def test_warnings(running, monkeypatch, ours, server):
    """A key that everybody may read is warned of, and so is plain text on an address that others can reach."""

    async def logged(**settings):
        with structlog.testing.capture_logs() as logs:
            async with running(**settings):
                pass
        return [entry["event"] for entry in logs if entry["log_level"] == "warning"]

    async def check():
        assert await logged() == []
        assert await logged(**server) == []
        with monkeypatch.context() as elsewhere:
            # Tests do not listen where others could connect.
            elsewhere.setattr("specpair_runtime.serving.server.is_local", lambda address: False)
            (warning,) = await logged()
            assert "plain text" in warning
            assert await logged(**server) == []
        (ours.path.parent / "server-key.pem").chmod(0o644)
        (warning,) = await logged(**server)
        assert "readable by every user" in warning

    asyncio.run(check())


def test_a_process_that_refuses_to_start(start, server):
    """The process ends with status 1, and its last word is the setting at fault."""
    half = start(f"--tls-cert={server['tls_cert']}")
    assert half.wait_for("failed")["event"] == "failed: tls_key: is required: TLS needs a certificate and its key"
    assert half.finish() == 1
