"""The ids of requests: what a caller may call one, and what it is called otherwise."""

from __future__ import annotations

import re
import uuid

__all__ = ["request_id_of"]

# Ids go into logs, metadata and HTTP headers as they are: no spaces, quotes or line ends, and no more than this.
_ACCEPTED = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def request_id_of(given: object = None) -> str:
    """The id that a caller gave, if it is 1 to 128 of the characters `A-Za-z0-9._:/+=-`; else a fresh one."""
    return given if isinstance(given, str) and _ACCEPTED.fullmatch(given) else uuid.uuid4().hex
