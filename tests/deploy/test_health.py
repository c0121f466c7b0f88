"""The images' health commands, as the Dockerfile and the manifests have them, against services that run."""

from __future__ import annotations

import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from specpair_runtime.serving.health import Health

from ..certificates import Authority
from ..e2e.processes import environment, script
from .files import ROLES, compose, health_command
from .proxies import free_address

ADDRESSES = {"target": "127.0.0.1:50051", "draft": "127.0.0.1:50052"}


def ask(role, address, **variables):
    """The exit status of a role's health command, at another address than the image's, and what it printed."""
    name, *arguments = health_command(role)
    assert arguments.count(ADDRESSES[role]) == 1
    arguments[arguments.index(ADDRESSES[role])] = address
    done = subprocess.run(
        [script(name), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(**variables),
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture
def draft(launch):
    """Starts a draft service without a model as compose.secured.yml does: itself, and its container's environment."""

    def start(authority):
        given = compose("deploy/compose.secured.yml")["services"]["draft"]["environment"]
        certificate, key = authority.files(authority.pair("draft"), "draft")
        tokens = authority.write("tokens", b"someone:0123456789abcdef0123456789abcdef\n")
        files = {"tls_cert": certificate, "tls_key": key, "tokens": tokens, "tls_ca": authority.path}
        mounted = {name: str(files.get(value.rpartition("/")[2], value)) for name, value in given.items()}

        def connect(address):
            trusted = grpc.ssl_channel_credentials(authority.pem)
            return grpc.secure_channel(address, trusted, options=[("grpc.ssl_target_name_override", "draft")])

        return launch("draft", "--proposer=ngram", env=mounted, connect=connect), mounted

    return start


def test_serving(targets):
    """A target that serves: 0."""
    assert ask("target", targets[0].address)[0] == 0


def test_secured(draft, tmp_path):
    """With TLS and tokens the command takes what it needs from the container's environment, and no token; else 1."""
    service, variables = draft(Authority(tmp_path, "inside"))
    assert ask("draft", service.address, **variables) == (0, f"draft {service.address}: serving\n")
    assert ask("draft", service.address)[0] == 1
    stranger = Authority(tmp_path, "outside")
    assert ask("draft", service.address, **{**variables, "SPECPAIR_TLS_CA": str(stranger.path)})[0] == 1


@pytest.mark.parametrize("role", ROLES)
def test_not_serving(role):
    """A service that loads or drains: 1, and so is one that nobody serves, and one that accepts and says nothing."""
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert ask(role, f"127.0.0.1:{port}") == (1, f"{role} 127.0.0.1:{port}: not serving\n")
    finally:
        server.stop(None).wait()
    assert ask(role, free_address())[0] == 1
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert ask(role, f"127.0.0.1:{silent.getsockname()[1]}")[0] == 1


def test_methods_of_newer_libraries():
    """The servicer has every method that a version of grpcio-health-checking registers, or no server starts with it."""
    assert {"Check", "Watch", "List"} <= set(dir(Health))
