"""The target service: verifies proposals with the large model."""

from __future__ import annotations

from specpair.extras import launch

__all__ = ["main"]


def main() -> None:
    """The command `specpair-target`; see `__main__`."""
    launch("specpair-target", "target", "specpair_target.__main__")
