"""The options of channels and servers are ones that gRPC knows; it takes any name and says nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from grpc._cython import cygrpc

from specpair import grpc_transports
from specpair_runtime.serving import server


@pytest.fixture(scope="module")
def known():
    """gRPC's own code, which holds the names as text."""
    return Path(cygrpc.__file__).read_bytes()


@pytest.mark.parametrize(
    "name",
    sorted({name for name, _ in (*grpc_transports._OPTIONS, *grpc_transports._SPREAD, *server._OPTIONS)}),
)
def test_grpc_knows_the_option(name, known):
    """By the very name, up to its end."""
    assert re.search(rb"(?<![a-z_.])" + re.escape(name.encode()) + rb"\0", known)
