"""What the gateway is told, and what it tells the client."""

from __future__ import annotations

import asyncio

import pytest
import structlog

from specpair import Credentials, InvalidRequestError
from specpair_gateway.__main__ import serve
from specpair_gateway.app import create_app
from specpair_gateway.config import GatewayConfig

from ..client.fakes import FakeTarget
from .serving import client_of

OPTIONS = {
    "draft_length": None,
    "draft_timeout": 2.0,
    "lookup": None,
    "connect_timeout": 5.0,
    "resume_timeout": 30.0,
    "credentials": Credentials(),
}


@pytest.fixture
def parse():
    """GatewayConfig.parse, and the lines on stderr if it refuses."""
    return lambda *argv: GatewayConfig.parse(argv, "specpair-gateway")


@pytest.fixture
def refused(parse, capsys):
    """The lines on stderr of a parse that fails."""

    def run(*argv):
        with pytest.raises(SystemExit) as end:
            parse(*argv)
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()

    return run


def test_nothing_is_served_to_others_by_default(parse):
    """Loopback alone, and plain connections to services on this machine."""
    config = parse()
    assert config.listen.startswith("127.0.0.1:")
    assert config.client_options == OPTIONS
    assert config.model_names == ()


def test_precedence(parse, monkeypatch, tmp_path):
    """A flag goes before the environment, that before the file."""
    file = tmp_path / "gateway.toml"
    file.write_text('target = "file:1"\ndraft = "file:2"\ntimeout = 5\n')
    monkeypatch.setenv("SPECPAIR_GATEWAY_DRAFT", "env:2")
    monkeypatch.setenv("SPECPAIR_GATEWAY_TIMEOUT", "6")
    config = parse(f"--config={file}", "--timeout=7")
    assert (config.target, config.draft, config.timeout) == ("file:1", "env:2", 7.0)


def test_client_options(parse, tmp_path):
    """Everything that a client can be told by flags."""
    token = tmp_path / "token"
    config = parse(
        "--draft-length=3",
        "--draft-timeout=1",
        "--no-lookup",
        "--connect-timeout=2",
        "--resume-timeout=0",
        "--service-tls-ca=ca.pem",
        "--service-tls-cert=cert.pem",
        "--service-tls-key=key.pem",
        "--service-tls-server-name=name",
        f"--service-token-file={token}",
    )
    assert config.client_options == {
        "draft_length": 3,
        "draft_timeout": 1.0,
        "lookup": False,
        "connect_timeout": 2.0,
        "resume_timeout": 0.0,
        "credentials": Credentials(ca="ca.pem", cert="cert.pem", key="key.pem", token=token, server_name="name"),
    }
    assert parse("--service-tls").client_options["credentials"].secure


def test_names(parse):
    """Several, with commas between."""
    assert parse("--served-model-name=a, b,").model_names == ("a", "b")


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["--timeout=-1"], "timeout"),
        (["--max-choices=0"], "max_choices"),
        (["--listen=here"], "listen"),
        (["--tls-cert=cert.pem"], "tls_cert"),
        (["--tls-key=key.pem"], "tls_cert"),
        (["--listen=0.0.0.0:8000", "--api-keys=keys"], "api_keys"),
    ],
)
def test_what_cannot_be(refused, argv, field):
    """Is named, and the process does not begin; keys are not taken in plain text from other machines unasked."""
    [line] = refused(*argv)
    assert line.startswith(f"error: {field}: ")


@pytest.mark.parametrize("more", [["--insecure-keys"], ["--tls-cert=c", "--tls-key=k"]])
def test_keys_from_other_machines(parse, more):
    """Come with TLS, or where somebody answers for it."""
    assert parse("--listen=0.0.0.0:8000", "--api-keys=keys", *more).api_keys == "keys"


@pytest.mark.parametrize("content", [None, "", "alice"])
def test_a_file_of_keys_that_cannot_be_used(tmp_path, content):
    """Missing, empty or something else: nobody is let in by mistake."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
        file.chmod(0o600)
    with pytest.raises(InvalidRequestError) as caught:
        create_app(GatewayConfig(api_keys=str(file)), client_of(FakeTarget()))
    assert caught.value.field == "api_keys"


def test_certificates_that_cannot_be_used(tmp_path):
    """The process does not begin, and says which setting is wrong."""
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("none")
    for cert in ("cert.pem", "missing.pem"):
        config = GatewayConfig(tls_cert=str(tmp_path / cert), tls_key=str(tmp_path / "key.pem"))
        with structlog.testing.capture_logs() as lines:
            assert asyncio.run(serve(config)) == 1
        assert lines[-1]["event"].startswith("failed: tls_cert: ")
