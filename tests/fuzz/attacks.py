"""What a peer may send that is no gRPC: nothing of HTTP/2, some of it, or too much of it."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Callable

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 8, 9
_END_STREAM, _END_HEADERS = 1, 4
_METHODS = [
    b"/specpair.v1.TargetService/Verify",
    b"/specpair.v1.TargetService/Generate",
    b"/specpair.v1.DraftService/Propose",
    b"/grpc.health.v1.Health/Watch",
    b"/nowhere",
]
# Seconds that a peer waits for what a service answers, at most.
_PATIENCE = 0.05

# Bytes to send, one after the other, from a source of chance.
Attack = Callable[[random.Random], list[bytes]]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2, RFC 9113, section 4.1."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _number(value: int) -> bytes:
    """An integer of HPACK with a prefix of 7 bits, RFC 7541, section 5.1."""
    if value < 127:
        return bytes([value])
    value -= 127
    rest = b""
    while value >= 128:
        rest += bytes([value % 128 + 128])
        value //= 128
    return bytes([127]) + rest + bytes([value])


def _header(name: bytes, value: bytes) -> bytes:
    return b"\0" + _number(len(name)) + name + _number(len(value)) + value


def _call(path: bytes, *more: bytes) -> bytes:
    known = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x"}
    known |= {b"content-type": b"application/grpc", b"te": b"trailers"}
    return b"".join((*(_header(name, value) for name, value in known.items()), *more))


def _opened(path: bytes, stream: int = 1, *more: bytes) -> bytes:
    return frame(_HEADERS, _END_HEADERS, stream, _call(path, *more))


_HELLO = _PREFACE + frame(_SETTINGS, 0, 0)


def _noise(chance: random.Random) -> list[bytes]:
    return [chance.randbytes(chance.choice([1, 24, 500, 60_000]))]


def _noise_behind_the_preface(chance: random.Random) -> list[bytes]:
    return [_HELLO, chance.randbytes(chance.choice([1, 9, 100, 20_000]))]


def _frames_at_random(chance: random.Random) -> list[bytes]:
    return [_HELLO, *(_some_frame(chance) for _ in range(chance.randrange(1, 20)))]


def _some_frame(chance: random.Random) -> bytes:
    stream = chance.choice([0, 1, 2, 3, 2**31 - 1, 2**32 - 1])
    return frame(chance.randrange(12), chance.randrange(256), stream, chance.randbytes(chance.choice([0, 4, 8, 30])))


def _truncated(chance: random.Random) -> list[bytes]:
    whole = _HELLO + _opened(chance.choice(_METHODS)) + frame(_DATA, 0, 1, _message(chance.randbytes(40)))
    return [whole[: chance.randrange(len(whole))]]


def _longer_than_it_says(chance: random.Random) -> list[bytes]:
    return [
        _HELLO,
        _opened(chance.choice(_METHODS)),
        struct.pack(">I", 2**24 - 1)[1:] + bytes(6) + chance.randbytes(99),
    ]


def _message(payload: bytes, length: int | None = None, compressed: int = 0) -> bytes:
    return struct.pack(">BI", compressed, len(payload) if length is None else length) + payload


def _messages(chance: random.Random) -> list[bytes]:
    """Messages that are none, compressed in no way that there is, longer than their frames, above the limit."""
    payload = chance.randbytes(chance.choice([0, 3, 200]))
    length = chance.choice([None, 0, len(payload) + 5, 2**31, 2**32 - 1])
    data = frame(_DATA, chance.choice([0, _END_STREAM]), 1, _message(payload, length, chance.choice([0, 1, 77])))
    return [_HELLO, _opened(chance.choice(_METHODS)), data]


def _huge_header_list(chance: random.Random) -> list[bytes]:
    fields = b"".join(_header(b"x-%d" % n, chance.randbytes(200).hex().encode()) for n in range(30))
    return [_HELLO, _opened(chance.choice(_METHODS), 1, fields)]


def _endless_headers(chance: random.Random) -> list[bytes]:
    more = frame(_CONTINUATION, 0, 1, _header(b"x", b"y" * 100))
    return [_HELLO, frame(_HEADERS, 0, 1, _call(chance.choice(_METHODS))), *[more * 50] * 20]


def _rapid_reset(chance: random.Random) -> list[bytes]:
    """Calls that are cancelled as soon as they are opened, many of them."""
    path = chance.choice(_METHODS)
    streams = range(1, 2 * chance.randrange(1, 200), 2)
    return [_HELLO, *(_opened(path, n) + frame(_RST_STREAM, 0, n, struct.pack(">I", 8)) for n in streams)]


def _many_calls(chance: random.Random) -> list[bytes]:
    """Calls without a first message, all at once."""
    return [_HELLO, *(_opened(chance.choice(_METHODS), n) for n in range(1, 2 * chance.randrange(1, 100), 2))]


def _flood(chance: random.Random) -> list[bytes]:
    kind, payload = chance.choice(
        [(_PING, bytes(8)), (_SETTINGS, bytes(6)), (_DATA, b""), (_WINDOW_UPDATE, b"\0\0\0\1")]
    )
    return [_HELLO, *[frame(kind, 0, 0, payload) * 100] * chance.randrange(1, 10)]


def _window_overflow(chance: random.Random) -> list[bytes]:
    most = frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1))
    return [_HELLO, _opened(chance.choice(_METHODS)), most, most, frame(_WINDOW_UPDATE, 0, 1, bytes(4))]


def _headers_of_a_call(chance: random.Random) -> list[bytes]:
    """Metadata that ask for strange things."""
    strange = [
        _header(b"grpc-timeout", chance.choice([b"0n", b"-1S", b"99999999H", b"abc", b"", b"1" * 90])),
        _header(b"grpc-encoding", chance.choice([b"gzip", b"nonsense"])),
        _header(b"x-request-id", chance.choice([b"\n\n", b"a" * 5000, b"\xff\xfe"])),
        _header(b"authorization", chance.choice([b"Bearer", b"\0", b"Bearer " + b"a" * 5000])),
        _header(chance.choice([b":path", b"UPPER", b"", b"grpc-status"]), b"x"),
        _header(b"content-type", b"text/html"),
    ]
    return [_HELLO, _opened(chance.choice(_METHODS), 1, *chance.sample(strange, 2)), frame(_DATA, 1, 1, _message(b""))]


def _other_protocols(chance: random.Random) -> list[bytes]:
    tls = b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + chance.randbytes(160)
    return [chance.choice([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", tls, b"SSH-2.0-x\r\n", b"\0" * 100, _PREFACE * 3])]


ATTACKS: tuple[Attack, ...] = (
    _noise,
    _noise_behind_the_preface,
    _frames_at_random,
    _truncated,
    _longer_than_it_says,
    _messages,
    _huge_header_list,
    _endless_headers,
    _rapid_reset,
    _many_calls,
    _flood,
    _window_overflow,
    _headers_of_a_call,
    _other_protocols,
)


def connect(address: str) -> socket.socket:
    """A plain connection."""
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=10)


def attack(address: str, chance: random.Random) -> None:
    """One attack, on a connection of its own, which is then closed, left half open or reset."""
    with connect(address) as peer, contextlib.suppress(OSError):
        for data in chance.choice(ATTACKS)(chance):
            peer.sendall(data)
        ending = chance.randrange(3)
        if ending == 0:
            peer.shutdown(socket.SHUT_WR)
        elif ending == 1:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.settimeout(_PATIENCE)
        while peer.recv(65536):
            pass


def slow_beginning(chance: random.Random) -> bytes:
    """The first bytes of a connection that does not go on."""
    return _HELLO[: chance.randrange(len(_HELLO))]
