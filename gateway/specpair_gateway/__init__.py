"""An HTTP server that speaks OpenAI's API in front of the services: a user of the client library, and nothing more."""

from __future__ import annotations

from specpair.extras import launch

__all__ = ["main"]


def main() -> None:
    """The command `specpair-gateway`; see `__main__`."""
    launch("specpair-gateway", "gateway", "specpair_gateway.__main__")
