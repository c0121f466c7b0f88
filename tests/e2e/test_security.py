"""Real services with mutual TLS and tokens: the same tokens as without, replaced secrets, and logs that keep quiet."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging

import grpc
import pytest

from specpair import (
    Credentials,
    DeadlineError,
    InvalidRequestError,
    SamplingParams,
    SpecpairError,
    SpeculativeClient,
    SyncSpeculativeClient,
    UnauthenticatedError,
    UnavailableError,
)
from specpair.v1 import target_pb2, target_pb2_grpc

from ..certificates import Authority
from .processes import DEMO, run
from .test_command import specpair

# Words that no log line has by itself.
PROMPT = "def xylophone_quasar():\n    "
STOP = "zeugma_obelisk"
PREDICTION = "    return kumquat_fjord\n"
TARGET_TOKEN = "wombat-target-0123456789"
DRAFT_TOKEN = "wombat-draft-0123456789"
WRONG_TOKEN = "wombat-nobody-0123456789"
TOKENS = 24
GREEDY = SamplingParams(max_new_tokens=TOKENS)
SAMPLED = SamplingParams(max_new_tokens=TOKENS, temperature=0.9, seed=5)


class Secured:
    """A target and a draft that ask for client certificates and tokens, each for tokens of its own."""

    def __init__(self, launch, directory, *flags, roles=("target", "draft")):
        self.ours, self.theirs = Authority(directory, "ours"), Authority(directory, "theirs")
        self.server = self.ours.files(self.ours.pair("localhost", "127.0.0.1"), "server")
        self.client = self.ours.files(self.ours.pair("alice@example.org"), "alice")
        self.tokens = {}
        self.services = {}
        for role, token in (("target", TARGET_TOKEN), ("draft", DRAFT_TOKEN)):
            digest = hashlib.sha256(token.encode()).hexdigest()
            self.tokens[role] = self.ours.write(f"{role}-tokens", f"alice:sha256:{digest}\n".encode())
            self.ours.write(f"{role}-token", token.encode())
            if role not in roles:
                continue
            self.services[role] = launch(
                role,
                f"--model={DEMO / role}",
                "--slots=4",
                "--max-length=256",
                f"--tls-cert={self.server[0]}",
                f"--tls-key={self.server[1]}",
                f"--tls-client-ca={self.ours.path}",
                f"--auth-tokens={self.tokens[role]}",
                *flags,
                connect=self._connect(token),
            )

    @property
    def target(self):
        """The target's address."""
        return self.services["target"].address

    @property
    def draft(self):
        """The draft's address."""
        return self.services["draft"].address

    def credentials(self, role, **changes):
        """What a service wants to see, but for some changes."""
        token = TARGET_TOKEN if role == "target" else DRAFT_TOKEN
        given = Credentials(ca=self.ours.path, cert=self.client[0], key=self.client[1], token=token)
        return dataclasses.replace(given, **changes)

    def options(self, **changes):
        """A client's options; the changes are to its credentials for the target."""
        return {"credentials": self.credentials("target", **changes), "draft_credentials": self.credentials("draft")}

    def flags(self):
        """The same for the command."""
        return [
            f"--target={self.target}",
            f"--tls-ca={self.ours.path}",
            f"--tls-cert={self.client[0]}",
            f"--tls-key={self.client[1]}",
            f"--token-file={self.ours.path.parent / 'target-token'}",
            f"--draft-token-file={self.ours.path.parent / 'draft-token'}",
        ]

    @property
    def secrets(self):
        """What no log may have at any level."""
        keys = [line for path in (self.server[1], self.client[1]) for line in path.read_text().splitlines()]
        digests = [hashlib.sha256(token.encode()).hexdigest() for token in (TARGET_TOKEN, DRAFT_TOKEN)]
        return [TARGET_TOKEN, DRAFT_TOKEN, WRONG_TOKEN, *digests, *(line for line in keys if "KEY" not in line)]

    def _connect(self, token):
        def connect(address):
            certified = grpc.ssl_channel_credentials(
                self.ours.pem, self.client[1].read_bytes(), self.client[0].read_bytes()
            )
            named = grpc.access_token_call_credentials(token)
            return grpc.secure_channel(address, grpc.composite_channel_credentials(certified, named))

        return connect


@pytest.fixture(scope="module")
def secured(launch, tmp_path_factory):
    """Both services, logging as they do by default."""
    return Secured(launch, tmp_path_factory.mktemp("secured"))


@pytest.fixture(scope="module")
def expected(secured):
    """The target's own continuation of PROMPT, greedy and sampled."""

    async def alone():
        async with SpeculativeClient(secured.target, "none", credentials=secured.credentials("target")) as client:
            return [await client.generate(PROMPT, params) for params in (GREEDY, SAMPLED)]

    return run(alone())


class TestPair:
    """A client with credentials."""

    @pytest.mark.parametrize("kind", ["model", "ngram"])
    def test_same_tokens(self, secured, expected, kind):
        """Output is that of the target alone, greedy and sampled, from both facades; the draft is really asked."""
        draft = secured.draft if kind == "model" else kind

        async def generate():
            async with SpeculativeClient(secured.target, draft, **secured.options()) as client:
                return [await client.generate(PROMPT, params) for params in (GREEDY, SAMPLED)]

        results = run(generate())
        with SyncSpeculativeClient(secured.target, draft, **secured.options()) as client:
            assert client.healthy() == (True, True if kind == "model" else None)
            results.append(client.generate(PROMPT, GREEDY))
        for result, reference in zip(results, [*expected, expected[0]], strict=True):
            assert result.token_ids == reference.token_ids
            assert result.text == reference.text
        assert kind == "ngram" or all(result.stats.proposed for result in results)

    def test_a_draft_that_does_not_let_us_in(self, secured, expected):
        """A draft that refuses a client costs speed, not tokens, and the reason is told."""

        async def generate():
            options = {**secured.options(), "draft_credentials": secured.credentials("target")}
            async with SpeculativeClient(secured.target, secured.draft, **options) as client:
                return await client.generate(PROMPT, GREEDY)

        result = run(generate())
        assert result.token_ids == expected[0].token_ids
        assert any("token" in change.reason for change in result.stats.proposer_changes)

    @pytest.mark.parametrize(
        ("changes", "kind", "text"),
        [
            ({"token": WRONG_TOKEN}, UnauthenticatedError, "a valid bearer token is required"),
            ({"token": None}, UnauthenticatedError, "a valid bearer token is required"),
            ({"cert": None, "key": None}, UnavailableError, "client certificate"),
            ({"server_name": "elsewhere.example"}, UnauthenticatedError, "server_name"),
            ({"ca": "theirs"}, UnauthenticatedError, "CA"),
        ],
    )
    def test_refusals(self, secured, changes, kind, text):
        """A client without the right credentials fails at once with a typed error that says what is missing."""
        if changes.get("ca"):
            changes = {"ca": secured.theirs.path}

        async def refused(call):
            async with SpeculativeClient(secured.target, "ngram", **secured.options(**changes)) as client:
                with pytest.raises(kind, match=text):
                    await call(client)

        async def check():
            await refused(lambda client: client.generate(PROMPT, GREEDY))
            await refused(lambda client: client.info())
            await refused(lambda client: client.tokenize(PROMPT))

        run(check(), within=20)


class TestCommand:
    """The `specpair` command with credentials."""

    def test_flags(self, secured, expected):
        """Every command that connects takes the credentials as files."""
        both = [*secured.flags(), f"--draft={secured.draft}"]
        done = specpair("generate", PROMPT, *both, f"--max-new-tokens={TOKENS}", "--json")
        assert (done.returncode, done.stderr) == (0, b"")
        assert json.loads(done.stdout)["token_ids"] == list(expected[0].token_ids)
        done = specpair("info", *both, "--json")
        assert (done.returncode, done.stderr) == (0, b"")
        assert all(json.loads(done.stdout)[role]["phase"] == "ready" for role in ("target", "draft"))
        done = specpair("explain", PROMPT, *both, "--json")
        assert (done.returncode, done.stderr) == (0, b"")
        done = specpair("health", *both)
        assert (done.returncode, done.stderr) == (0, b"")

    def test_environment(self, secured, expected):
        """The same in the environment; a token file that is missing there is the usage's fault."""
        place = secured.ours.path.parent
        variables = {
            "SPECPAIR_TLS_CA": str(secured.ours.path),
            "SPECPAIR_TLS_CERT": str(secured.client[0]),
            "SPECPAIR_TLS_KEY": str(secured.client[1]),
            "SPECPAIR_TOKEN_FILE": str(place / "target-token"),
        }
        flags = [f"--target={secured.target}", "--draft=ngram", f"--max-new-tokens={TOKENS}", "--ids"]
        done = specpair("generate", PROMPT, *flags, **variables)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode().split() == [str(token) for token in expected[0].token_ids]
        done = specpair("generate", PROMPT, *flags, **{**variables, "SPECPAIR_TOKEN_FILE": str(place / "absent")})
        assert done.returncode == 2
        assert b"error: credentials.token: cannot read" in done.stderr

    def test_without(self, secured):
        """Without credentials each command fails, and says what the service may want."""
        for command in (["generate", PROMPT, "--draft=none"], ["info", "--draft=none"]):
            done = specpair(*command, f"--target={secured.target}")
            assert done.returncode == 3
            assert b"may want TLS" in done.stderr
        done = specpair("health", f"--target={secured.target}")
        assert done.returncode == 1
        assert b"may want TLS" in done.stderr


def test_replaced_under_way(secured, expected):
    """Certificates and tokens are replaced while a turn runs: it goes on, and the next client needs the new ones."""
    chain, key = (path.read_bytes() for path in secured.server)
    digests = secured.tokens["target"].read_bytes()
    new = "wombat-renewed-0123456789"
    renewed = secured.theirs.pair("127.0.0.1")

    async def generate(**changes):
        async with SpeculativeClient(secured.target, "ngram", **secured.options(**changes)) as client:
            return await client.generate(PROMPT, GREEDY)

    async def check():
        async with SpeculativeClient(secured.target, "ngram", draft_length=1, **secured.options()) as client:
            stream = client.stream(PROMPT, GREEDY)
            async with stream:
                await anext(stream)
                secured.ours.write("server.pem", renewed.chain)
                secured.ours.write("server-key.pem", renewed.key)
                secured.ours.write("target-tokens", f"alice:{new}\n".encode())
                with pytest.raises(UnauthenticatedError, match="CA"):
                    await generate()
                with pytest.raises(UnauthenticatedError, match="token"):
                    await generate(ca=secured.theirs.path)
                result = await generate(ca=secured.theirs.path, token=new)
                assert result.token_ids == expected[0].token_ids
                async for _ in stream:
                    pass
            assert stream.result.token_ids == expected[0].token_ids

    try:
        run(check())
    finally:
        secured.ours.write("server.pem", chain)
        secured.ours.write("server-key.pem", key)
        secured.ours.write("target-tokens", digests)
    assert run(generate()).token_ids == expected[0].token_ids


async def _everything(secured):
    """A client's whole repertoire, good, bad and failing, with words in it that can be found again; what came out."""
    results = []

    async def failing(work, *kinds):
        with pytest.raises(kinds or SpecpairError):
            await work

    for draft in (secured.draft, "ngram", "none"):
        async with SpeculativeClient(secured.target, draft, draft_length=2, **secured.options()) as client:
            results += [await client.generate(PROMPT, params) for params in (GREEDY, SAMPLED)]
            results.append(await client.generate(PROMPT, dataclasses.replace(GREEDY, stop=(STOP,), logprobs=2)))
            await client.info()
            await client.healthy()
            ids = await client.tokenize(PROMPT)
            await client.detokenize(ids)
            await client.explain(PROMPT, ids[:2])
            # Bad ones, each with the words in another place.
            for params in (
                SamplingParams(temperature=-1.0, max_new_tokens=4, stop=(STOP,)),
                SamplingParams(max_new_tokens=4, stop=(STOP * 2000,)),
                SamplingParams(max_new_tokens=4, logit_bias={10**6: 1.0}),
            ):
                await failing(client.generate(PROMPT, params), InvalidRequestError)
            await failing(client.generate(PROMPT * 200, GREEDY))
            await failing(client.generate("", GREEDY), InvalidRequestError)
            await failing(client.generate([{"role": STOP, "content": PROMPT}], GREEDY))
            await failing(client.explain(PROMPT, [10**6]), InvalidRequestError)
            # Failing ones: out of time, abandoned.
            await failing(client.generate(PROMPT, GREEDY, timeout=0.001), DeadlineError, UnavailableError)
            async with client.stream(PROMPT, GREEDY) as stream:
                await anext(stream)
    async with SpeculativeClient(secured.target, "ngram", **secured.options()) as client:
        results.append(await client.generate(PROMPT, GREEDY, prediction=PREDICTION))
        async with client.session() as session:
            results.append(await session.generate(PROMPT, GREEDY))
            results.append(await session.generate(PROMPT, GREEDY))
    for changes in ({"token": WRONG_TOKEN}, {"token": None}, {"cert": None, "key": None}, {"ca": secured.theirs.path}):
        async with SpeculativeClient(secured.target, secured.draft, **secured.options(**changes)) as client:
            await failing(client.generate(PROMPT, GREEDY), UnauthenticatedError, UnavailableError)
    await _malformed(secured)
    return results


async def _malformed(secured):
    """Bytes that are no message, with the words among them."""
    certified = grpc.ssl_channel_credentials(
        secured.ours.pem, secured.client[1].read_bytes(), secured.client[0].read_bytes()
    )
    metadata = [("authorization", f"Bearer {TARGET_TOKEN}")]
    async with grpc.aio.secure_channel(secured.target, certified) as channel:
        for method in ("Generate", "Verify", "Tokenize"):
            call = channel.stream_stream(f"/specpair.v1.TargetService/{method}")(metadata=metadata, timeout=20)
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                await call.write(b"\xff" + PROMPT.encode())
                await call.read()
            assert await call.code() is not grpc.StatusCode.OK
        stub = target_pb2_grpc.TargetServiceStub(channel)
        session = stub.Verify(metadata=metadata, timeout=20)
        await session.write(target_pb2.VerifyRequest(block=target_pb2.Block(token_ids=[1, 2])))
        assert await session.code() is not grpc.StatusCode.OK


def _found(words, text):
    return {word for word in words if word in text}


def test_logs_keep_quiet(secured, caplog):
    """No prompt, stop string, output, token or key is logged by the services, nor at any level by the client."""
    caplog.set_level(logging.DEBUG)
    results = run(_everything(secured))
    assert len(results) >= 12
    texts = {line.strip() for result in results for line in result.text.splitlines() if len(line.strip()) > 12}
    ids = {", ".join(map(str, result.token_ids[start : start + 4])) for result in results for start in range(0, 16, 4)}
    assert texts
    words = {"xylophone", "quasar", STOP, "kumquat", *texts, *ids, *secured.secrets}
    for role, service in secured.services.items():
        calls = [entry for entry in service.entries() if entry["event"] == "call"]
        assert {"OK"} < {entry["status"] for entry in calls}, role  # the calls above did go through this log
        assert _found(words, service.text) == set(), role
    assert _found(words, caplog.text) == set()
    assert {entry.get("caller") for entry in calls} >= {"alice"}  # who called is no secret
    statuses = {entry["status"] for entry in secured.services["target"].entries() if entry["event"] == "call"}
    assert statuses >= {"OK", "INVALID_ARGUMENT", "UNAUTHENTICATED"}


def test_debug_logs_keep_secrets(launch, tmp_path_factory, caplog):
    """Tokens and keys are not logged at the most talkative level either, also when their files are broken."""
    caplog.set_level(logging.DEBUG)
    secured = Secured(launch, tmp_path_factory.mktemp("talkative"), "--log-level=debug", roles=["target"])
    service = secured.services["target"]

    async def check():
        async with SpeculativeClient(secured.target, "ngram", **secured.options()) as client:
            await client.generate(PROMPT, GREEDY)
            await client.healthy()
        for changes in ({"token": WRONG_TOKEN}, {"token": None}, {"cert": None, "key": None}):
            async with SpeculativeClient(secured.target, "ngram", **secured.options(**changes)) as client:
                with pytest.raises((UnauthenticatedError, UnavailableError)):
                    await client.generate(PROMPT, GREEDY)
        await _malformed(secured)

    run(check())
    secured.ours.write("target-tokens", f"alice:{TARGET_TOKEN} unusable\n".encode())
    secured.ours.write("server-key.pem", secured.client[1].read_bytes())
    run(check())
    assert "new tokens cannot be used" in service.text
    assert "new certificates cannot be used" in service.text
    assert any(entry["level"] == "debug" for entry in service.entries())
    assert service.stop() == 0
    assert _found(secured.secrets, service.text) == set()
    assert _found(secured.secrets, caplog.text) == set()
