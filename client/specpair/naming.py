"""What the strings mean that name a target and a draft."""

from __future__ import annotations

from typing import Literal

from specpair.addresses import separate
from specpair.errors import InvalidRequestError

__all__ = ["DEFAULT_DRAFT", "DEFAULT_TARGET", "Kind", "draft_of", "target_addresses"]

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_DRAFT = "127.0.0.1:50052"

Kind = Literal["model", "auto", "ngram", "none"]


def target_addresses(target: str) -> list[str]:
    """The addresses of a target, or of several. Raises InvalidRequestError if one is empty."""
    addresses = separate(target)
    if not all(addresses):
        raise InvalidRequestError("must be HOST:PORT, or several of them with commas between", field="target")
    return addresses


def draft_of(draft: str) -> tuple[Kind, str]:
    """What kind of draft is meant, and the address of its service, "" without one. Raises InvalidRequestError."""
    match draft:
        case "none":
            return "none", ""
        case "ngram":
            return "ngram", ""
        case "auto":
            return "auto", DEFAULT_DRAFT
        case "" | "auto:":
            raise InvalidRequestError("must be HOST:PORT, auto, auto:HOST:PORT, ngram or none", field="draft")
    return "auto" if draft.startswith("auto:") else "model", draft.removeprefix("auto:")
