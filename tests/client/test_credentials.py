"""Credentials: what is refused before anything is sent, where tokens come from, what the command makes of options."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import subprocess
from pathlib import Path

import pytest

from specpair import Credentials, SpeculativeClient, SyncSpeculativeClient, services
from specpair.addresses import is_local
from specpair.commands import app
from specpair.connecting import Connecting
from specpair.credentials import Access
from specpair.errors import InvalidRequestError, SpecpairError, UnauthenticatedError, UnavailableError
from specpair.grpc_transports import GrpcTarget
from specpair.handshake import explained

from ..certificates import Authority

HERE = "127.0.0.1:50051"
ELSEWHERE = "target.example:50051"
TOKEN = "alice-0123456789abcdef"


@pytest.fixture
def ours(tmp_path):
    """A certificate authority."""
    return Authority(tmp_path, "ours")


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("Localhost", True),
        ("[::1]:1", True),
        ("[::ffff:127.0.0.1]:1", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv6:[::1]:1", True),
        ("unix:/run/x.sock", True),
        ("unix:relative.sock", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
        ("dns:///target.example:1", False),
        ("dns://10.0.0.1/localhost:1", False),
        ("target", False),
        ("", False),
    ],
)
def test_what_stays_on_this_machine(address, local):
    """Loopback addresses, localhost and unix sockets are local; every other name is not, whatever it stands for."""
    assert is_local(address) is local


@pytest.mark.parametrize("token", [TOKEN, lambda: TOKEN, "file"])
def test_no_token_in_plain_text(tmp_path, token):
    """A token goes to another machine in TLS or when that is explicitly asked for; the client is not even made."""
    if token == "file":
        token = tmp_path / "token"
        token.write_text(TOKEN)
    bare = Credentials(token=token)
    for client in (SpeculativeClient, SyncSpeculativeClient):
        with pytest.raises(InvalidRequestError, match="plain text") as refused:
            client(ELSEWHERE, "none", credentials=bare)
        assert refused.value.field == "credentials.token"
        with pytest.raises(InvalidRequestError, match="plain text"):
            client(HERE, ELSEWHERE, credentials=bare)
        with pytest.raises(InvalidRequestError, match="plain text"):
            client(HERE, ELSEWHERE, draft_credentials=bare)
    for address, more in ((HERE, {}), (ELSEWHERE, {"tls": True}), (ELSEWHERE, {"insecure_token": True})):
        access = Access(address, dataclasses.replace(bare, **more))
        assert access.metadata() == (("authorization", f"Bearer {TOKEN}"),)
    assert Access(ELSEWHERE, Credentials()).metadata() is None


@pytest.mark.parametrize("name", ["ca", "cert", "key"])
def test_pem_text_in_place_of_a_path(name):
    """Is refused by the name of the field, and not shown: it may be a key."""
    text = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"
    given = {"ca": "ca.pem", "cert": b"", "key": b"", name: text}
    with pytest.raises(InvalidRequestError) as refused:
        GrpcTarget("127.0.0.1:1", Credentials(**given))._channel  # noqa: B018 - opens it
    assert "c2VjcmV0" not in str(refused.value)


def test_nothing_secret_is_shown(ours):
    """The text of credentials has neither the token nor the key."""
    pair = ours.pair("alice@example.org")
    shown = repr(Credentials(ca=ours.path, cert="cert.pem", key=pair.key, token=TOKEN))
    assert TOKEN not in shown
    assert "PRIVATE KEY" not in shown
    assert "cert.pem" in shown


def test_a_token_file_is_read_again(tmp_path, caplog):
    """A changed file holds for the next call, blanks around the token aside; an unusable one changes nothing."""
    path = tmp_path / "token"
    path.write_text(f"  {TOKEN}\n")
    access = Access(HERE, Credentials(token=path))
    assert access.metadata() == (("authorization", f"Bearer {TOKEN}"),)
    path.write_text(TOKEN + "2")
    assert access.metadata() == (("authorization", f"Bearer {TOKEN}2"),)
    path.write_text("two words\n")
    assert access.metadata() == (("authorization", f"Bearer {TOKEN}2"),)
    path.unlink()
    for _ in range(3):
        assert access.metadata() == (("authorization", f"Bearer {TOKEN}2"),)
    path.write_text(TOKEN + "3")
    assert access.metadata() == (("authorization", f"Bearer {TOKEN}3"),)
    # Once for each change, and never what stands in it.
    assert len(caplog.records) == 2
    assert "two words" not in caplog.text
    assert TOKEN not in caplog.text


def test_a_token_function_is_asked_each_time():
    """A function is asked before each call; what it fails with, or returns that is no token, is a typed error."""
    answers = iter([TOKEN, TOKEN + "2", "two words", None])
    access = Access(HERE, Credentials(token=lambda: next(answers)))
    assert access.metadata() == (("authorization", f"Bearer {TOKEN}"),)
    assert access.metadata() == (("authorization", f"Bearer {TOKEN}2"),)
    for _ in range(3):
        with pytest.raises(UnauthenticatedError, match="token function failed") as failed:
            access.metadata()
        assert "two words" not in str(failed.value)


def _bad(ours, name):
    pair, other = ours.pair("alice@example.org"), ours.pair("bob@example.org")
    return {
        "no key": ({"cert": pair.chain}, "credentials.key"),
        "no certificate": ({"key": pair.key}, "credentials.cert"),
        "TLS off and a CA": ({"ca": ours.path, "tls": False}, "credentials.tls"),
        "absent CA": ({"ca": "/nowhere/ca.pem"}, "credentials.ca"),
        "no CA in it": ({"ca": b"nonsense"}, "credentials.ca"),
        "absent certificate": ({"cert": Path("/nowhere/c.pem"), "key": pair.key}, "credentials.cert"),
        "no certificate in it": ({"cert": b"nonsense", "key": pair.key}, "credentials.cert"),
        "another's key": ({"cert": pair.chain, "key": other.key}, "credentials.key"),
        "no key in it": ({"cert": pair.chain, "key": b"nonsense"}, "credentials.key"),
        "an empty token": ({"token": ""}, "credentials.token"),
        "a token of two words": ({"token": "two words"}, "credentials.token"),
        "a header in the token": ({"token": f"{TOKEN}\r\nx-admin: 1"}, "credentials.token"),
        "an absent token": ({"token": Path("/nowhere/token")}, "credentials.token"),
        "an empty token file": ({"token": ours.write("empty", b"\n")}, "credentials.token"),
        "no text in the token file": ({"token": ours.write("binary", b"\xff\xfe")}, "credentials.token"),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "no key",
        "no certificate",
        "TLS off and a CA",
        "absent CA",
        "no CA in it",
        "absent certificate",
        "no certificate in it",
        "another's key",
        "no key in it",
        "an empty token",
        "a token of two words",
        "a header in the token",
        "an absent token",
        "an empty token file",
        "no text in the token file",
    ],
)
def test_unusable_credentials(ours, name):
    """Credentials that cannot work are refused by the name of the field when the client is made."""
    given, field = _bad(ours, name)
    with pytest.raises(InvalidRequestError) as refused:
        SpeculativeClient(HERE, "none", credentials=Credentials(**given))
    assert refused.value.field == field
    assert "two words" not in str(refused.value)


def test_files_become_channels(ours):
    """Usable files in any form make a channel, with the name to expect."""

    async def check():
        pair = ours.pair("alice@example.org")
        chain, key = ours.files(pair, "alice")
        for ca, cert, private in ((ours.path, chain, key), (str(ours.path), str(chain), str(key))):
            credentials = Credentials(ca=ca, cert=cert, key=private, server_name="target.example", token=TOKEN)
            assert credentials.secure
            await Access(ELSEWHERE, credentials).channel(()).close()
        await Access(ELSEWHERE, Credentials(tls=True)).channel(()).close()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("text", "kind", "advice"),
    [
        ("CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate", UnauthenticatedError, "CA"),
        ("CERTIFICATE_VERIFY_FAILED: certificate has expired", UnauthenticatedError, "expired"),
        ("CERTIFICATE_VERIFY_FAILED: certificate is not yet valid", UnauthenticatedError, "clocks"),
        ("Hostname Verification Check failed.", UnauthenticatedError, "server_name"),
        ("SSLV3_ALERT_BAD_CERTIFICATE", UnauthenticatedError, "cert and key"),
        ("WRONG_VERSION_NUMBER", UnavailableError, "no TLS"),
        ("Socket closed", UnavailableError, "client certificate"),
        ("recvmsg:Connection reset by peer", UnavailableError, "client certificate"),
    ],
)
def test_handshakes_are_explained(text, kind, advice):
    """A connection that could not be made over certificates says what to do; gRPC's own words stay at the end."""
    failed = UnavailableError(f"failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:5: {text}")
    error = explained(failed)
    assert type(error) is kind
    assert advice in error.message
    assert error.message.endswith(f"({failed.message})")


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:5: Connection refused"),
        UnavailableError("Socket closed"),
        UnavailableError("Connection reset by peer"),
        SpecpairError("failed to connect: CERTIFICATE_VERIFY_FAILED"),
    ],
)
def test_other_failures_stay_what_they_are(error):
    """What has nothing to do with certificates is not touched: refused connections, streams that break later."""
    assert explained(error) is error


def test_options_of_the_command():
    """The draft gets what the target gets, where nothing else is said, and no token in plain text beside TLS."""
    files = {"tls_cert": Path("c"), "tls_key": Path("k"), "token_file": Path("t"), "tls_server_name": "n"}
    both = Connecting(tls_ca=Path("ca"), **files)
    assert both.target == Credentials(Path("ca"), Path("c"), Path("k"), Path("t"), "n")
    assert both.draft == dataclasses.replace(both.target, tls=True)
    assert dataclasses.replace(both, draft_tls=False).draft == Credentials()
    own = dataclasses.replace(both, draft_tls_ca=Path("ca2"), draft_token_file=Path("t2"))
    assert own.draft == dataclasses.replace(both.draft, ca=Path("ca2"), token=Path("t2"))
    assert dataclasses.replace(own, draft_tls_ca=None, draft_tls=False).draft == Credentials(token=Path("t2"))
    assert Connecting(token_file=Path("t")).draft == Credentials(token=Path("t"))
    assert Connecting(token_file=Path("t"), draft_tls=True).draft == Credentials(token=Path("t"), tls=True)
    assert Connecting().target == Connecting().draft == Credentials()
    with pytest.raises(InvalidRequestError, match="draft_tls_ca: is of no use with --no-draft-tls"):
        dataclasses.replace(own, draft_tls=False).draft  # noqa: B018 - it is a property that refuses


def test_every_command_that_connects_has_the_options():
    """All commands but those that connect to nothing of others take every option, and none takes a token by value."""
    connecting = {field.name for field in dataclasses.fields(Connecting)}
    for command in app.registered_commands:
        given = set(inspect.signature(command.callback).parameters)
        assert given & connecting == (set() if command.callback.__name__ in ("plan", "demo") else connecting)
        assert "token" not in given


def test_services_of_the_demonstration_are_plain(monkeypatch, tmp_path):
    """The services that the demonstration starts take no TLS and no tokens from the environment of other services."""
    started = []
    monkeypatch.setenv("SPECPAIR_TARGET_TLS_CERT", "elsewhere.pem")
    monkeypatch.setenv("SPECPAIR_TARGET_AUTH_TOKENS", "elsewhere")
    monkeypatch.setenv("SPECPAIR_TARGET_LOG_LEVEL", "debug")
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.append(options["env"]))
    with (tmp_path / "log").open("wb") as log:
        services.Service("target", GrpcTarget, [], log)
    assert {name for name in started[0] if name.startswith("SPECPAIR_TARGET_")} == {"SPECPAIR_TARGET_LOG_LEVEL"}
