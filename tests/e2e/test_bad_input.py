"""Bad input gets a typed error that names the field, and costs nobody else anything."""

from __future__ import annotations

import threading

import grpc
import pytest

from specpair import InvalidRequestError, SamplingParams, SpeculativeClient
from specpair.errors import from_rpc_error
from specpair.v1 import common_pb2, draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc

from .conftest import BF16_LENGTH, VOCABULARY
from .processes import run, wait_for
from .sessions import APPLIED, RawSession, ids_prompt, refused, start_of, target_stub

INVALID = grpc.StatusCode.INVALID_ARGUMENT
ABORTED = grpc.StatusCode.ABORTED
PARAMS = SamplingParams(max_new_tokens=10)


@pytest.fixture
def undisturbed(bf16, prompts):
    """While a test sends what it likes, a session that began before it goes on; so does one that begins after it."""
    prompt = prompts[4]

    async def whole():
        async with SpeculativeClient(*bf16("model")) as client:
            return (await client.generate(prompt, PARAMS)).token_ids

    before = run(whole())
    output = []
    disturbed = threading.Event()

    def requests():
        yield start_of(prompt, sampling=common_pb2.SamplingParams(max_new_tokens=len(before)))
        for round in range(len(before)):
            wait_for(lambda due=round: len(output) >= due, 30, "the verdict before")
            if round == 2:
                disturbed.wait(120)
            yield target_pb2.VerifyRequest(block=target_pb2.Block(round=round, base_length=len(prompt) + round))

    responses = target_pb2_grpc.TargetServiceStub(bf16.target.channel).Verify(requests())
    assert next(responses).HasField("started")
    output += next(responses).verdict.committed.token_ids
    yield
    disturbed.set()
    for response in responses:
        output += response.verdict.committed.token_ids
    assert tuple(output) == before == run(whole())


PROMPTS = {
    "prompt.text": "",
    "prompt.token_ids": [],
    "prompt.token_ids.ids[1]": [1, VOCABULARY],
    "prompt.token_ids.ids[0]": [-1],
    "prompt.token_ids.ids[2]": [1, 2, "three"],
    "prompt.token_ids ": [5] * (BF16_LENGTH + 1),
    "prompt.text ": "x = 1\n" * BF16_LENGTH,
    "prompt.chat": [{"role": "user", "content": "hello"}],
    "prompt.chat.messages[0]": [{"role": "user"}],
    "prompt": 7,
}
PARAMETERS = {
    "sampling.temperature": [{"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": 101.0}],
    "sampling.top_p": [{"top_p": 0.0}, {"top_p": 1.01}, {"top_p": float("nan")}],
    "sampling.top_k": [{"top_k": -1}, {"top_k": 2**32}],
    "sampling.seed": [{"seed": -1}, {"seed": 2**64}],
    "sampling.max_new_tokens": [{"max_new_tokens": 0}, {"max_new_tokens": -1}],
    "sampling.rule": [{"rule": "guess"}],
    "stop.stop_strings": [{"stop": ["a"] * 17}, {"stop": "abc"}],
    "stop.stop_strings[1]": [{"stop": ["a", ""]}, {"stop": ["a", "b" * 257]}],
    "stop.stop_token_ids": [{"stop_token_ids": range(65)}],
    "stop.stop_token_ids[2]": [{"stop_token_ids": [1, 2, VOCABULARY]}],
}


@pytest.mark.usefixtures("undisturbed")
class TestClient:
    """Over the client library: an exception whose `field` is the path in the request message."""

    @pytest.mark.parametrize("kind", ["model", "ngram", "none"])
    def test_refused(self, bf16, kind):
        """Prompts and parameters that cannot be used."""
        prefix = "" if kind == "none" else "start."

        async def check():
            async with SpeculativeClient(*bf16(kind)) as client:

                async def expect(field, prompt, params):
                    with pytest.raises(InvalidRequestError) as caught:
                        await client.generate(prompt, params)
                    assert caught.value.field == prefix + field, caught.value
                    assert str(caught.value).startswith(f"{prefix}{field}: ")

                for field, prompt in PROMPTS.items():
                    await expect(field.strip(), prompt, PARAMS)
                for field, cases in PARAMETERS.items():
                    for changes in cases:
                        await expect(field, "x = ", SamplingParams(**changes))

        run(check())

    def test_tokenize(self, bf16):
        """The unary calls name their fields too."""

        async def check():
            async with SpeculativeClient(*bf16("none")) as client:
                for field, prompt in PROMPTS.items():
                    with pytest.raises(InvalidRequestError) as caught:
                        await client.tokenize(prompt)
                    assert caught.value.field == field.strip()
                for ids, field in (
                    ([VOCABULARY], "token_ids[0]"),
                    ([-1], "token_ids[0]"),
                    ([0, 2**32], "token_ids[1]"),
                ):
                    with pytest.raises(InvalidRequestError) as caught:
                        await client.detokenize(ids)
                    assert caught.value.field == field

        run(check())


def start_without(**fields):
    return target_pb2.VerifyRequest(start=target_pb2.SessionStart(**fields))


STARTS = [
    (start_without(), INVALID, "start.prompt"),
    (start_without(prompt=common_pb2.Prompt()), INVALID, "start.prompt"),
    (start_without(prompt=common_pb2.Prompt(text="")), INVALID, "start.prompt.text"),
    (start_without(prompt=ids_prompt([])), INVALID, "start.prompt.token_ids"),
    (start_of([1, 2**32 - 1]), INVALID, "start.prompt.token_ids.ids[1]"),
    (start_of([1] * (BF16_LENGTH + 1)), INVALID, "start.prompt.token_ids"),
    (start_of([1], committed_token_ids=[2, VOCABULARY]), INVALID, "start.committed_token_ids[1]"),
    (start_of([1], committed_token_ids=[2] * BF16_LENGTH), INVALID, "start.committed_token_ids"),
    (start_of([1], committed_token_ids=[0]), INVALID, "start.committed_token_ids"),
    (start_of([1], sampling=common_pb2.SamplingParams(temperature=-1)), INVALID, "start.sampling.temperature"),
    (
        start_of([1], sampling=common_pb2.SamplingParams(temperature=float("inf"))),
        INVALID,
        "start.sampling.temperature",
    ),
    (start_of([1], sampling=common_pb2.SamplingParams(max_new_tokens=0)), INVALID, "start.sampling.max_new_tokens"),
    (start_of([1], stop=common_pb2.StopCriteria(stop_strings=[""])), INVALID, "start.stop.stop_strings[0]"),
    (target_pb2.VerifyRequest(block=target_pb2.Block()), ABORTED, "message"),
    (target_pb2.VerifyRequest(extend=target_pb2.SessionExtend()), ABORTED, "message"),
    (target_pb2.VerifyRequest(), ABORTED, "message"),
]

BLOCKS = [
    ([1] * 8, "block.token_ids"),
    ([1, 2, VOCABULARY], "block.token_ids[2]"),
    ([2**32 - 1], "block.token_ids[0]"),
]


@pytest.mark.usefixtures("undisturbed")
class TestRawTarget:
    """Over raw stubs: the status and the BadRequest that any gRPC client sees."""

    def test_first_message(self, bf16):
        """A session that cannot begin."""

        async def check():
            async with target_stub(bf16.target.address) as stub:
                for request, code, field in STARTS:
                    call = stub.Verify()
                    async with refused(code, field):
                        await call.write(request)
                        await call.read()
                        await call.read()

        run(check())

    def test_block(self, bf16, prompts):
        """A block that cannot be judged ends its session."""

        async def check():
            async with target_stub(bf16.target.address) as stub:
                for ids, field in BLOCKS:
                    session = await RawSession.open(stub, prompts[4])
                    assert (await session.send(session.block([1]))).status == APPLIED
                    async with refused(INVALID, field):
                        await session.send(session.block(ids))

        run(check())

    def test_wrong_message(self, bf16, prompts):
        """A second start, or nothing at all."""

        async def check():
            async with target_stub(bf16.target.address) as stub:
                for message, code, field in [
                    (start_of(prompts[4]), ABORTED, "start"),
                    (target_pb2.VerifyRequest(), ABORTED, "message"),
                ]:
                    session = await RawSession.open(stub, prompts[4])
                    async with refused(code, field):
                        await session.call.write(message)
                        await session.call.read()

        run(check())

    def test_block_behind_the_end(self, bf16, prompts):
        """A block that comes after the end of the turn is stale, whatever length it continues: the session lives on."""
        ended = common_pb2.SamplingParams(max_new_tokens=1)

        async def check():
            async with target_stub(bf16.target.address) as stub:
                session = await RawSession.open(stub, prompts[4], sampling=ended)
                assert (await session.send(session.block([1, 2]))).committed.finish_reason
                for _ in range(2):
                    assert (await session.send(session.block())).status == target_pb2.Verdict.STATUS_STALE
                await session.finish()

        run(check())

    def test_generate(self, bf16):
        """Generate names the same fields, without `start.`."""

        async def check():
            async with target_stub(bf16.target.address) as stub:
                call = stub.Generate(target_pb2.GenerateRequest(prompt=ids_prompt([VOCABULARY])))
                async with refused(INVALID, "prompt.token_ids.ids[0]"):
                    await call.read()

        run(check())

    def test_bytes_that_are_no_message(self, bf16):
        """Garbage on the wire fails its call alone, and it is the caller's fault: as the first message and later."""
        garbage = b"\xff\xff\xff\xff"
        cases = [(bf16.target, "TargetService", method, [garbage]) for method in ("Generate", "Verify", "Tokenize")] + [
            (bf16.draft, "DraftService", "Propose", [garbage]),
            (bf16.target, "TargetService", "Verify", [start_of([1]).SerializeToString(), garbage]),
            (bf16.draft, "DraftService", "Propose", [starts(token_ids=[1]).SerializeToString(), garbage]),
        ]

        async def drained(call):
            while await call.read() is not grpc.aio.EOF:
                pass

        async def check():
            for service, name, method, messages in cases:
                async with grpc.aio.insecure_channel(service.address) as channel:
                    call = channel.stream_stream(f"/specpair.v1.{name}/{method}")()
                    for message in messages:
                        await call.write(message)
                    await call.done_writing()
                    with pytest.raises(grpc.RpcError) as caught:
                        await drained(call)
                    assert caught.value.code() == INVALID, caught.value
                    assert from_rpc_error(caught.value).reason == "MALFORMED_MESSAGE"

        run(check())

    def test_no_message_at_all(self, bf16):
        """A Verify stream that is closed at once ends well."""

        async def check():
            async with target_stub(bf16.target.address) as stub:
                call = stub.Verify()
                await call.done_writing()
                assert await call.read() is grpc.aio.EOF
                assert await call.code() == grpc.StatusCode.OK

        run(check())


def asks(**fields):
    return draft_pb2.ProposeRequest(ask=draft_pb2.ProposeAsk(**{"round": 1, "max_tokens": 4, **fields}))


def starts(**fields):
    return draft_pb2.ProposeRequest(start=draft_pb2.ProposeStart(**fields))


DRAFT = [
    ([starts()], INVALID, "start.token_ids"),
    ([starts(token_ids=[1, VOCABULARY])], INVALID, "start.token_ids[1]"),
    (
        [starts(token_ids=[1], sampling=common_pb2.SamplingParams(temperature=-1))],
        INVALID,
        "start.sampling.temperature",
    ),
    ([asks()], ABORTED, "message"),
    ([draft_pb2.ProposeRequest()], ABORTED, "message"),
    ([starts(token_ids=[1]), draft_pb2.ProposeRequest()], ABORTED, "message"),
    ([starts(token_ids=[1]), asks(from_position=1, max_tokens=0)], INVALID, "ask.max_tokens"),
    ([starts(token_ids=[1]), asks(from_position=1, max_tokens=65)], INVALID, "ask.max_tokens"),
    ([starts(token_ids=[1]), asks(from_position=2)], INVALID, "ask.from_position"),
    ([starts(token_ids=[1]), asks(from_position=0)], INVALID, "ask.from_position"),
    ([starts(token_ids=[1]), asks(from_position=1, token_ids=[VOCABULARY])], INVALID, "ask.token_ids[0]"),
]


@pytest.mark.usefixtures("undisturbed")
def test_raw_draft(bf16):
    """The draft service names the field as the target does."""

    async def check():
        async with grpc.aio.insecure_channel(bf16.draft.address) as channel:
            for messages, code, field in DRAFT:
                call = draft_pb2_grpc.DraftServiceStub(channel).Propose()
                async with refused(code, field):
                    for message in messages:
                        await call.write(message)
                        assert await call.read() is not grpc.aio.EOF

    run(check())


def test_models_that_are_not_there(launch, tmp_path):
    """A service without a model ends soon, with one line that names `model` and what is wrong with it."""
    missing = tmp_path / "missing"
    cases = [
        (launch("target", f"--model={missing}"), f"failed: model: no such directory: {missing}"),
        (launch("draft", f"--model={tmp_path}"), f"failed: model: no model config in '{tmp_path}'"),
    ]
    for service, message in cases:
        assert service.wait(180) == 1
        [line] = [entry["event"] for entry in service.entries() if entry["level"] == "error"]
        assert line.startswith(message)
        assert "Traceback" not in service.text
