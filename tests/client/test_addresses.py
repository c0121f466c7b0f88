"""What an address says besides who can listen in, which tests of credentials are about."""

from __future__ import annotations

import pytest

from specpair import InvalidRequestError, SpeculativeClient
from specpair.addresses import names_several, separate


@pytest.mark.parametrize(
    ("address", "several"),
    [
        ("dns:///target.example:50051", True),
        ("dns:target.example:50051", True),
        ("dns://10.0.0.53/target.example:50051", True),
        ("ipv4:10.0.0.1:50051,10.0.0.2:50051", True),
        ("ipv6:[::1]:50051,[::2]:50051", True),
        ("ipv4:10.0.0.1:50051", False),
        ("ipv6:[::1]:50051", False),
        ("target.example:50051", False),
        ("127.0.0.1:50051", False),
        ("unix:/run/a,b.sock", False),
        ("xds:///target", False),
    ],
)
def test_which_stand_for_several(address, several):
    """Names that are to be looked up as such and lists are spread over; everything else is one server."""
    assert names_several(address) is several


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("a:1", ["a:1"]),
        ("a:1, b:2", ["a:1", "b:2"]),
        ("127.0.0.1:1,127.0.0.1:2", ["127.0.0.1:1", "127.0.0.1:2"]),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", ["ipv4:127.0.0.1:1,127.0.0.1:2"]),
        ("ipv4:127.0.0.1:1, 127.0.0.1:2", ["ipv4:127.0.0.1:1,127.0.0.1:2"]),
        ("ipv6:[::1]:1,[::1]:2", ["ipv6:[::1]:1,[::1]:2"]),
        ("ipv4:10.0.0.1:1,10.0.0.2:1,b:2,10.0.0.3:1", ["ipv4:10.0.0.1:1,10.0.0.2:1", "b:2", "10.0.0.3:1"]),
        ("ipv4:10.0.0.1:1,10.0.0.2:1,ipv4:10.0.1.1:1", ["ipv4:10.0.0.1:1,10.0.0.2:1", "ipv4:10.0.1.1:1"]),
        ("dns:///a:1,dns:///b:1", ["dns:///a:1", "dns:///b:1"]),
        ("ipv4:10.0.0.1:1,10.0.0.2", ["ipv4:10.0.0.1:1", "10.0.0.2"]),
        ("ipv4:10.0.0.1:1,", ["ipv4:10.0.0.1:1", ""]),
    ],
)
def test_lists_stay_together(text, addresses):
    """Commas stand between addresses, and within those that are lists of literal ones."""
    assert separate(text) == addresses


@pytest.mark.parametrize("target", ["", "a:1,", "ipv4:10.0.0.1:1,"])
def test_none_is_empty(target):
    """An address that is missing is noticed before anything is sent."""
    with pytest.raises(InvalidRequestError, match="HOST:PORT"):
        SpeculativeClient(target, "none")
