"""The draft service: proposes what the target will probably say."""

from __future__ import annotations

from specpair.extras import launch

__all__ = ["main"]


def main() -> None:
    """The command `specpair-draft`; see `__main__`."""
    launch("specpair-draft", "draft", "specpair_draft.__main__")
