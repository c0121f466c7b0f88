"""Sets fields of protobuf messages to what a caller gave, which may be anything.

What a field cannot hold, such as a negative number in an unsigned one, is an InvalidRequestError that names the field:
by `path`, the path from the request message to the message that the field is in, and its name.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

from google.protobuf.message import Message

from specpair.errors import InvalidRequestError

__all__ = ["extend_field", "set_field", "unfit"]


def set_field(message: Message, field: str, value: object, path: str) -> None:
    """Sets a field; None leaves it unset."""
    if value is None:
        return
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as refused:
        raise unfit(value, f"{path}{field}") from refused


def extend_field(message: Message, field: str, values: Iterable[object], path: str) -> None:
    """Appends values to a repeated field."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InvalidRequestError("must be a sequence", field=f"{path}{field}")
    values = list(values)
    repeated = getattr(message, field)
    try:
        repeated.extend(values)  # one call for the usual case: prompts are long
        return
    except (TypeError, ValueError):
        message.ClearField(field)
    for i, value in enumerate(values):
        try:
            repeated.append(value)
        except (TypeError, ValueError) as refused:
            raise unfit(value, f"{path}{field}[{i}]") from refused


def unfit(value: object, path: str) -> InvalidRequestError:
    """The error for a value that the field at `path` cannot hold."""
    return InvalidRequestError(f"{reprlib.repr(value)} does not fit this field", field=path)
