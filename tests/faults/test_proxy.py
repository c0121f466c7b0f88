"""The proxy does to plain sockets what its toxics say, to every byte and to nothing else."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from ..proxy import TcpProxy, Toxics

WAYS = ["upstream", "downstream"]
TEXT = bytes(range(256)) * 20


class Server:
    """Takes connections one after the other; `accept` gives the next one."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]

    def accept(self):
        there, _ = self._socket.accept()
        there.settimeout(10)
        return there

    def close(self):
        self._socket.close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def proxy(server):
    with TcpProxy("127.0.0.1", server.port) as proxy:
        yield proxy


@contextlib.contextmanager
def ends(proxy, server):
    """Both ends of a new connection through the proxy: here, there."""
    host, port = proxy.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as here, server.accept() as there:
        yield here, there


def along(way, both):
    """Sender and receiver of a direction."""
    here, there = both
    return (here, there) if way == "upstream" else (there, here)


def receive(receiver, count):
    """Exactly so many bytes, or all until the end."""
    data = b""
    while len(data) < count and (more := receiver.recv(count - len(data))):
        data += more
    return data


def until(condition):
    """Waits for what another thread does."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def nothing_for(receiver, seconds):
    """Whether nothing comes, no end either."""
    receiver.settimeout(seconds)
    try:
        receiver.recv(1)
    except TimeoutError:
        return True
    finally:
        receiver.settimeout(10)
    return False


@pytest.mark.parametrize("way", WAYS)
class TestToxics:
    """Each toxic, in each direction."""

    def test_none(self, proxy, server, way):
        """Without toxics bytes and the end of the stream pass, and the other direction stays open."""
        with ends(proxy, server) as both:
            sender, receiver = along(way, both)
            sender.sendall(TEXT)
            sender.shutdown(socket.SHUT_WR)
            assert receive(receiver, len(TEXT) + 1) == TEXT
            receiver.sendall(b"still open")
            assert receive(sender, 10) == b"still open"

    def test_latency(self, proxy, server, way):
        """Bytes are late in this direction alone, and many are under way at once."""
        proxy.afflict(way, latency=2.0)
        with ends(proxy, server) as both:
            sender, receiver = along(way, both)
            begun = time.monotonic()
            for n in range(10):
                sender.sendall(bytes([n]))
                time.sleep(0.01)
            assert receive(receiver, 10) == bytes(range(10))
            assert 2.09 <= time.monotonic() - begun < 10.0
            receiver.sendall(b"quick")
            begun = time.monotonic()
            assert receive(sender, 5) == b"quick"
            assert time.monotonic() - begun < 2.0

    def test_jitter(self, proxy, server, way):
        """Bytes stay in order however much their latency varies."""
        proxy.afflict(way, latency=0.02, jitter=0.02)
        with ends(proxy, server) as both:
            sender, receiver = along(way, both)
            for n in range(50):
                sender.sendall(bytes([n]))
                time.sleep(0.002)
            assert receive(receiver, 50) == bytes(range(50))

    def test_bandwidth(self, proxy, server, way):
        """So many bytes take so long."""
        proxy.afflict(way, bandwidth=20_000, slicer=500)
        with ends(proxy, server) as both:
            sender, receiver = along(way, both)
            begun = time.monotonic()
            sender.sendall(TEXT)
            assert receive(receiver, len(TEXT)) == TEXT
            assert time.monotonic() - begun >= 0.9 * (len(TEXT) - 500) / 20_000

    def test_slicer(self, proxy, server, way):
        """Bytes come in pieces with pauses between them, all of them."""
        proxy.afflict(way, slicer=100, slicer_pause=0.005)
        with ends(proxy, server) as both:
            sender, receiver = along(way, both)
            sender.sendall(TEXT)
            pieces = []
            while sum(map(len, pieces)) < len(TEXT):
                pieces.append(receiver.recv(len(TEXT)))
            assert b"".join(pieces) == TEXT
            assert len(pieces) > 10

    def test_limit_data(self, proxy, server, way):
        """After so many bytes in this direction both ends see the end of the connection."""
        proxy.afflict(way, limit_data=300)
        with ends(proxy, server) as both:
            sender, receiver = along(way, both)
            sender.sendall(TEXT[:200])
            assert receive(receiver, 200) == TEXT[:200]
            sender.sendall(TEXT[200:400])
            assert receive(receiver, 1000) == TEXT[200:300]
            with contextlib.suppress(ConnectionResetError):
                assert receive(sender, 1) == b""

    def test_slow_close(self, proxy, server, way):
        """The end of the stream is late; the bytes before it are not."""
        proxy.afflict(way, slow_close=0.3)
        with ends(proxy, server) as both:
            sender, receiver = along(way, both)
            begun = time.monotonic()
            sender.sendall(b"last")
            sender.shutdown(socket.SHUT_WR)
            assert receive(receiver, 4) == b"last"
            assert receive(receiver, 1) == b""
            assert time.monotonic() - begun >= 0.29

    def test_timeout(self, proxy, server, way):
        """Bytes are taken and lost for good; those that come after it pass."""
        proxy.afflict(way, timeout=True)
        with ends(proxy, server) as both:
            sender, receiver = along(way, both)
            sender.sendall(TEXT)
            assert nothing_for(receiver, 0.1)
            proxy.heal()
            sender.sendall(b"later")
            assert receive(receiver, 5) == b"later"

    def test_stall(self, proxy, server, way):
        """Bytes are held back and lost never."""
        proxy.afflict(way, stall=True)
        with ends(proxy, server) as both:
            sender, receiver = along(way, both)
            sender.sendall(TEXT)
            assert nothing_for(receiver, 0.1)
            proxy.heal()
            assert receive(receiver, len(TEXT)) == TEXT

    def test_half_close(self, proxy, server, way):
        """One direction ends, for both ends' sight of it; what is sent there is lost; the other direction goes on."""
        with ends(proxy, server) as both:
            sender, receiver = along(way, both)
            sender.sendall(b"before")
            assert receive(receiver, 6) == b"before"
            proxy.half_close(way)
            assert receive(receiver, 1) == b""
            sender.sendall(b"lost")
            receiver.sendall(b"answer")
            assert receive(sender, 6) == b"answer"


class TestConnections:
    """What happens to whole connections."""

    def test_down(self, proxy, server):
        """New connections are refused, open ones stay, and the address is the same afterwards."""
        address = proxy.address
        with ends(proxy, server) as (here, there):
            proxy.down()
            host, port = address.split(":")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((host, int(port)))
            here.sendall(b"open")
            assert receive(there, 4) == b"open"
        proxy.up()
        assert proxy.address == address
        with ends(proxy, server) as (here, there):
            there.sendall(b"back")
            assert receive(here, 4) == b"back"
        assert proxy.accepted == 2

    @pytest.mark.parametrize("how", ["cut", "reset_peer"])
    def test_ended_now(self, proxy, server, how):
        """Every connection ends at both ends, by a reset if it is one; the next one works."""
        with ends(proxy, server) as one, ends(proxy, server) as other:
            one[0].sendall(b"x")
            assert receive(one[1], 1) == b"x"
            until(lambda: proxy.open == 2)
            getattr(proxy, how)()
            for end in (*one, *other):
                if how == "reset_peer":
                    with pytest.raises(ConnectionResetError):
                        end.recv(1)
                else:
                    assert end.recv(1) == b""
            until(lambda: proxy.open == 0)
        with ends(proxy, server) as (here, there):
            here.sendall(b"again")
            assert receive(there, 5) == b"again"

    def test_nobody_there(self, server):
        """Where nobody listens behind the proxy, a connection ends at once."""
        server.close()
        with TcpProxy("127.0.0.1", server.port) as proxy:
            host, port = proxy.address.split(":")
            with socket.create_connection((host, int(port)), timeout=10) as here:
                assert here.recv(1) == b""

    def test_back_pressure(self, proxy, server):
        """Behind a stall a sender is held back in the end: the proxy does not swallow without bound."""
        proxy.afflict("upstream", stall=True)
        with ends(proxy, server) as (here, _):
            here.settimeout(1.0)
            with pytest.raises(TimeoutError):
                here.sendall(bytes(400 * 1024 * 1024))

    def test_changed_while_running(self, proxy, server):
        """Toxics come and go under an open connection, and not one byte of a healed network is touched."""
        with ends(proxy, server) as (here, there):
            sent, done = [], threading.Event()

            def send():
                while not done.is_set():
                    here.sendall(TEXT[:97])
                    sent.append(97)
                    time.sleep(0.001)

            sender = threading.Thread(target=send)
            sender.start()
            for toxics in (
                Toxics(latency=0.01, jitter=0.01),
                Toxics(slicer=7),
                Toxics(stall=True),
                Toxics(bandwidth=1e6),
            ):
                proxy.upstream = toxics
                time.sleep(0.05)
            proxy.heal()
            done.set()
            sender.join()
            assert receive(there, sum(sent)) == TEXT[:97] * len(sent)

    def test_delay(self, server):
        """`delay` is the latency of both directions, and changes with it."""
        with TcpProxy("127.0.0.1", server.port, delay=0.05) as proxy:
            assert (proxy.upstream, proxy.downstream) == (Toxics(latency=0.05),) * 2
            proxy.delay = 0.1
            assert (proxy.delay, proxy.downstream) == (0.1, Toxics(latency=0.1))
