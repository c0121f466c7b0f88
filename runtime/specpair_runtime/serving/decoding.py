"""Bytes to requests inside the call: bytes that are no message are the caller's mistake and not the service's."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

from google.protobuf.message import DecodeError

from specpair.errors import InvalidRequestError

__all__ = ["decoding"]

_Decode = Callable[[bytes], Any]


def decoding(handler: Callable[[Any, Any], Any], decode: _Decode | None) -> Callable[[Any, Any], Any]:
    """A handler that takes its request, or stream of requests, as bytes.

    gRPC decodes before it calls a handler, and answers what it cannot decode with UNKNOWN. Here InvalidRequestError is
    raised where the handler reads, and nothing is decoded before the call has been let in. `decode` None: the handler
    wants bytes.
    """
    if decode is None:
        return handler

    def called(request: Any, context: Any) -> Any:  # noqa: ANN401 - gRPC's request, bytes or a stream of them
        return handler(_Decoded(request, decode) if hasattr(request, "__aiter__") else _read(request, decode), context)

    return called


class _Decoded:
    """The messages of a stream. Unlike a generator it holds nothing that would have to be closed."""

    def __init__(self, stream: AsyncIterable[bytes], decode: _Decode) -> None:
        self._stream = aiter(stream)
        self._decode = decode

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401
        return _read(await anext(self._stream), self._decode)


def _read(data: bytes, decode: _Decode) -> Any:  # noqa: ANN401
    try:
        return decode(data)
    except DecodeError:
        raise InvalidRequestError("these bytes are no such message", reason="MALFORMED_MESSAGE") from None
