"""Bearer tokens and client certificates against every method that a service has: no handler is reached without them."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import hmac

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from specpair.v1 import draft_pb2, target_pb2
from specpair_runtime.serving import ServiceStatus, serve
from specpair_runtime.serving.auth import read_tokens
from specpair_runtime.serving.health import Health
from specpair_runtime.serving.identity import current_identity

from ..certificates import Authority

ALICE = "alice-0123456789abcdef"
BOB = "bob-0123456789abcdef"
HEALTH = "/grpc.health.v1.Health/"
# Stands for "does not hang".
WITHIN = 10


def _methods(*files):
    return [
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


OURS = _methods(target_pb2, draft_pb2)
REFLECTION = [*_methods(reflection_pb2), "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"]
NOBODYS = ["/specpair.v1.TargetService/Nothing", "/specpair.v1.NoService/GetModelInfo", "/", "/x"]
GUARDED = [*OURS, *REFLECTION, *NOBODYS]
OPEN = _methods(health_pb2)


@pytest.fixture
def counting(fake, monkeypatch):
    """An async context manager: a server with every method of both services, whose handlers count their calls."""
    reached = collections.Counter()

    async def answer(requests, context):
        reached[current_identity()] += 1
        yield b""

    def count(owner, name):
        original = getattr(owner, name)

        def counted(self, request, context):
            reached[name] += 1
            return original(self, request, context)

        monkeypatch.setattr(owner, name, counted)

    count(reflection.aio.ReflectionServicer, "ServerReflectionInfo")
    count(Health, "Check")
    count(Health, "Watch")

    def register(server):
        by_service = collections.defaultdict(dict)
        for method in OURS:
            _, service, name = method.split("/")
            by_service[service][name] = grpc.stream_stream_rpc_method_handler(answer)
        for service, handlers in by_service.items():
            server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
        return list(by_service)

    @contextlib.asynccontextmanager
    async def run(**settings):
        reached.clear()
        listening = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(
            serve(
                fake.FakeConfig(**{"listen": "127.0.0.1:0", **settings}),
                register=register,
                load=lambda status: None,
                status=ServiceStatus(),
                close=lambda: None,
                on_listening=listening.set_result,
            )
        )
        await asyncio.wait({task, listening}, return_when=asyncio.FIRST_COMPLETED)
        try:
            yield (None if task.done() else listening.result()), reached
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    return run


@pytest.fixture
def tokens(tmp_path):
    """A file with two tokens, one of them as its digest."""
    path = tmp_path / "tokens"
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    path.write_text(f"# who may call\n\nalice:{ALICE}\n  bob:sha256:{digest}\n")
    path.chmod(0o600)
    return path


async def _call(channel, method, *authorization, message=b""):
    """Status and text of one call, whatever the method is."""
    metadata = [("authorization", value) for value in authorization]
    # A stream of requests with one in it looks the same. What is written behind the end of a call would be an error of
    # this side's own.
    call = channel.unary_stream(method)(message, metadata=metadata, timeout=WITHIN)
    with contextlib.suppress(grpc.RpcError):
        async for _ in call:
            if method.endswith("/Watch"):
                call.cancel()
                return grpc.StatusCode.OK, ""
    return await call.code(), await call.details()


BAD = {
    "missing": (),
    "empty": ("",),
    "no token": ("Bearer",),
    "empty token": ("Bearer ",),
    "wrong token": (f"Bearer {ALICE}x",),
    "part of a token": (f"Bearer {ALICE[:-1]}",),
    "other case": (f"Bearer {ALICE.upper()}",),
    "wrong scheme": (f"Basic {ALICE}",),
    "no scheme": (ALICE,),
    "name and token": (f"Bearer alice:{ALICE}",),
    "a digest": (f"Bearer {hashlib.sha256(BOB.encode()).hexdigest()}",),
    "a digest as written": (f"Bearer sha256:{hashlib.sha256(BOB.encode()).hexdigest()}",),
    "two of them": (f"Bearer {ALICE}", f"Bearer {ALICE}"),
    "more behind it": (f"Bearer {ALICE} {ALICE}",),
    "a comment's": ("Bearer # who may call",),
}


@pytest.mark.parametrize("bad", BAD)
def test_denied_by_default(counting, tokens, bad):
    """Without a known token every method ends alike, unknown ones and reflection included, and reaches no handler."""

    async def check():
        async with counting(auth_tokens=str(tokens)) as (address, reached):
            async with grpc.aio.insecure_channel(address) as channel:
                for method in GUARDED:
                    # What is sent is no message of any kind: nothing tries to read it.
                    answer = await _call(channel, method, *BAD[bad], message=b"\xff\xff")
                    assert answer == (grpc.StatusCode.UNAUTHENTICATED, "a valid bearer token is required"), method
            assert not reached

    asyncio.run(check())


def test_silence_is_denied_too(counting, tokens):
    """A client without a token that opens a stream and says nothing is turned away like any other."""

    async def check():
        async with (
            counting(auth_tokens=str(tokens)) as (address, reached),
            grpc.aio.insecure_channel(address) as channel,
        ):
            calls = [channel.stream_stream(method)(timeout=WITHIN) for method in OURS]
            assert {await call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
            assert not reached

    asyncio.run(check())


def test_health_needs_no_token(counting, tokens):
    """Health answers whatever a caller shows or does not show; methods that it does not have are nobody's."""

    async def check():
        async with counting(auth_tokens=str(tokens)) as (address, reached):
            async with grpc.aio.insecure_channel(address) as channel:
                for authorization in BAD.values():
                    for method in OPEN:
                        assert (await _call(channel, method, *authorization))[0] is grpc.StatusCode.OK
                assert (await _call(channel, f"{HEALTH}Nothing"))[0] is grpc.StatusCode.UNIMPLEMENTED
            assert reached == {"Check": len(BAD), "Watch": len(BAD)}

    asyncio.run(check())


def test_a_token_opens_every_method(counting, tokens):
    """With a token every handler is entered once, and the caller goes by the token's name; its scheme has no case."""

    async def check():
        async with counting(auth_tokens=str(tokens)) as (address, reached):
            async with grpc.aio.insecure_channel(address) as channel:
                for method in OURS:
                    assert (await _call(channel, method, f"Bearer {ALICE}"))[0] is grpc.StatusCode.OK, method
                    assert (await _call(channel, method, f"bearer {BOB}"))[0] is grpc.StatusCode.OK, method
                for method in REFLECTION:
                    assert (await _call(channel, method, f"Bearer {ALICE}"))[0] is grpc.StatusCode.OK, method
                for method in NOBODYS:
                    assert (await _call(channel, method, f"Bearer {ALICE}"))[0] is grpc.StatusCode.UNIMPLEMENTED, method
            assert reached == {"alice": len(OURS), "bob": len(OURS), "ServerReflectionInfo": len(REFLECTION)}

    asyncio.run(check())


def test_every_method_is_known_to_these_tests(running, tokens):
    """What reflection lists is what the tests above go through."""

    async def check():
        async with running(auth_tokens=str(tokens)) as service:
            ask = service.channel.stream_stream(
                REFLECTION[0],
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )(metadata=[("authorization", f"Bearer {ALICE}")])
            await ask.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            listed = {service.name for service in (await ask.read()).list_services_response.service}
        assert listed <= {method.split("/")[1] for method in (*GUARDED, *OPEN)}

    asyncio.run(check())


@pytest.mark.parametrize(
    "bad", ["wrong CA", "no certificate", "expired certificate", "other CA's certificate", "no TLS"]
)
def test_mutual_tls_lets_nobody_through(counting, tokens, tmp_path, bad):
    """Without a good certificate nothing is reached at all, health included, whatever token comes along."""
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    chain, key = ours.files(ours.pair("localhost", "127.0.0.1"), "server")
    trust, client = {
        "wrong CA": (theirs.pem, ours.pair("alice@example.org")),
        "no certificate": (ours.pem, None),
        "expired certificate": (ours.pem, ours.pair("alice@example.org", expired=True)),
        "other CA's certificate": (ours.pem, theirs.pair("alice@example.org")),
        "no TLS": (None, None),
    }[bad]

    def channel(address):
        if trust is None:
            return grpc.aio.insecure_channel(address)
        credentials = grpc.ssl_channel_credentials(trust, client and client.key, client and client.chain)
        return grpc.aio.secure_channel(address, credentials)

    async def check():
        settings = {"tls_cert": str(chain), "tls_key": str(key), "tls_client_ca": str(ours.path)}
        async with counting(auth_tokens=str(tokens), **settings) as (address, reached):
            for method in (*GUARDED, *OPEN):
                async with channel(address) as opened:
                    assert (await _call(opened, method, f"Bearer {ALICE}"))[0] is grpc.StatusCode.UNAVAILABLE, method
            assert not reached

    asyncio.run(check())


def test_every_entry_is_compared(counting, tokens, monkeypatch):
    """A token is compared with all that are known, in constant time each, also behind the one that matches."""
    compared = []
    genuine = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *pair: compared.append(pair) or genuine(*pair))

    async def check():
        async with counting(auth_tokens=str(tokens)) as (address, _), grpc.aio.insecure_channel(address) as channel:
            for shown in (ALICE, BOB, "nobody's"):
                compared.clear()
                await _call(channel, OURS[0], f"Bearer {shown}")
                assert len(compared) == 2
                assert {len(part) for pair in compared for part in pair} == {hashlib.sha256().digest_size}

    asyncio.run(check())


def test_tokens_are_replaced_under_way(counting, tokens):
    """A changed file holds for the next call; one that cannot be used changes nothing; an empty one denies all."""

    async def check():
        async with counting(auth_tokens=str(tokens)) as (address, _), grpc.aio.insecure_channel(address) as channel:

            async def accepted():
                answers = [await _call(channel, OURS[0], f"Bearer {token}") for token in (ALICE, BOB)]
                return [code is grpc.StatusCode.OK for code, _ in answers]

            assert await accepted() == [True, True]
            with structlog.testing.capture_logs() as logs:
                tokens.write_text(f"alice:{ALICE}\n")
                assert await accepted() == [True, False]
                tokens.write_text(f"alice:{ALICE}\nbob:{BOB} and more\n")
                assert await accepted() == [True, False]
                tokens.unlink()
                assert await accepted() == [True, False]
                tokens.write_text(f"bob:{BOB}\nbob:{BOB}2\n")
                assert await accepted() == [False, True]
                tokens.write_text("# nobody\n")
                assert await accepted() == [False, False]
            said = [entry["event"] for entry in logs if entry["log_level"] == "error"]
            assert len(said) == 2
            assert "line 2" in said[0]
            assert "cannot read" in said[1]
            assert not any(secret in str(logs) for secret in (ALICE, BOB))

    asyncio.run(check())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("alice", "line 1 is neither"),
        ("alice:", "line 1 is neither"),
        (":secret-0123456789abcdef", "line 1 is neither"),
        ("\n#\nal ice:secret-0123456789abcdef", "line 3 is neither"),
        ("alice:short", "line 1 has a token that is not 16"),
        ("alice:0123456789 abcdef", "line 1 has a token"),
        ("alice:sha256:abcd", "line 1 has no SHA-256"),
        ("alice:sha256:" + "g" * 64, "line 1 has no SHA-256"),
    ],
)
def test_token_lines_that_are_none(text, problem):
    """A line that is no token is named by its number; what stands in it is not repeated."""
    with pytest.raises(ValueError, match=problem) as refused:
        read_tokens(text)
    assert "secret" not in str(refused.value)


def test_token_lines():
    """Names and tokens in any order, digests in either case, comments and blank lines; one name may have several."""
    digest = hashlib.sha256(ALICE.encode()).hexdigest()
    found = read_tokens(f"\n# one\n a.b@c-d_1:{ALICE} \nbob:sha256:{digest.upper()}\nbob:{'x' * 16}==\n")
    assert [token.name for token in found] == ["a.b@c-d_1", "bob", "bob"]
    assert found[0].digest == found[1].digest == bytes.fromhex(digest)
    assert ALICE not in repr(found)


@pytest.mark.parametrize(("content", "problem"), [(None, "cannot read"), ("", "no token"), ("nonsense", "line 1")])
def test_refuses_to_start(counting, tmp_path, content, problem):
    """A service whose tokens cannot be read, or that has none, does not start, and says which setting is at fault."""
    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content)

    async def check():
        with structlog.testing.capture_logs() as logs:
            async with counting(auth_tokens=str(path)) as (address, _):
                assert address is None
        (failure,) = [entry["event"] for entry in logs if entry["log_level"] == "error"]
        assert failure.startswith("failed: auth_tokens: ")
        assert problem in failure

    asyncio.run(check())


def test_no_tokens_in_plain_text(counting, tokens, tmp_path, monkeypatch):
    """Where others can reach the address, tokens need TLS or the explicit wish to do without."""
    # Tests do not listen where others could connect.
    monkeypatch.setattr("specpair_runtime.serving.auth.is_local", lambda address: False)
    ours = Authority(tmp_path, "ours")
    chain, key = ours.files(ours.pair("127.0.0.1"), "server")

    async def starts(**settings):
        with structlog.testing.capture_logs() as logs:
            async with counting(auth_tokens=str(tokens), **settings) as (address, _):
                return address is not None, str(logs)

    async def check():
        started, logs = await starts()
        assert not started
        assert "auth_tokens: tokens would come in plain text" in logs
        assert (await starts(insecure_tokens=True))[0]
        assert (await starts(tls_cert=str(chain), tls_key=str(key)))[0]

    asyncio.run(check())


def test_open_files_are_warned_of(counting, tokens):
    """A file of tokens that every user of the machine may read is warned of."""

    async def warnings():
        with structlog.testing.capture_logs() as logs:
            async with counting(auth_tokens=str(tokens)):
                pass
        return [entry["event"] for entry in logs if entry["log_level"] == "warning"]

    async def check():
        assert await warnings() == []
        tokens.chmod(0o640)
        assert await warnings() == []
        tokens.chmod(0o644)
        (warning,) = await warnings()
        assert "auth_tokens" in warning
        assert "readable by every user" in warning

    asyncio.run(check())
