"""The services as operators meet them: configuration, health, reflection, overload, draining."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from specpair import (
    DraftMismatchError,
    FinishReason,
    OverloadedError,
    SamplingParams,
    Source,
    SpeculativeClient,
    UnavailableError,
)
from specpair.v1 import common_pb2, draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc
from specpair_draft.config import DraftConfig
from specpair_target.config import TargetConfig

from .drafts import prophet, serving
from .processes import DEMO, UNHURRIED, environment, leftovers, run
from .sessions import RawSession, ids_prompt, target_stub

TARGET = "specpair.v1.TargetService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
TOKENS = 20
DOES_NOT_HANG = 20


def test_answers_while_computing(bf16, prompts):
    """Health, reflection and GetModelInfo are answered while every slot computes, and nothing is compiled anew."""

    async def check():
        async with grpc.aio.insecure_channel(bf16.target.address) as channel:
            stub = target_pb2_grpc.TargetServiceStub(channel)
            calls = [
                stub.Generate(
                    target_pb2.GenerateRequest(prompt=ids_prompt(prompt), stop=common_pb2.StopCriteria(ignore_eos=True))
                )
                for prompt in prompts[:8]
            ]
            for call in calls:
                await call.read()
                assert (await call.read()).HasField("committed")
            health = health_pb2_grpc.HealthStub(channel)
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            for _ in range(5):
                for service in ("", TARGET):
                    request = health_pb2.HealthCheckRequest(service=service)
                    assert (await health.Check(request, timeout=DOES_NOT_HANG)).status == SERVING
                request = target_pb2.TargetServiceGetModelInfoRequest()
                info = (await stub.GetModelInfo(request, timeout=DOES_NOT_HANG)).info
                assert (info.phase, info.slots_in_use, info.recompilations) == (common_pb2.PHASE_READY, 8, 0)
                listing = reflection.ServerReflectionInfo(timeout=DOES_NOT_HANG)
                await listing.write(reflection_pb2.ServerReflectionRequest(list_services=""))
                response = await listing.read()
                assert TARGET in {service.name for service in response.list_services_response.service}
                listing.cancel()
            assert not any(call.done() for call in calls)
            for call in calls:
                call.cancel()

    run(check())


def test_model_info(bf16, reference):
    """Both services say what they run, and agree about their vocabulary."""
    target, draft = bf16.target.info(), bf16.draft.info()
    for info, directory in ((target, "target"), (draft, "draft")):
        assert info.model == str(DEMO / directory)
        assert info.phase == common_pb2.PHASE_READY
        assert (info.architecture, info.dtype, info.quantization) == ("LlamaForCausalLM", "bf16", "none")
        assert info.parameters > 0
        assert not info.chat
    assert (target.slots, target.verify_width) == (8, 8)
    assert draft.proposers == [common_pb2.SOURCE_MODEL, common_pb2.SOURCE_NGRAM]
    assert target.fingerprint.vocabulary_size == len(reference.tokenizer)
    assert target.fingerprint == draft.fingerprint


@pytest.fixture(scope="module")
def ending(prompts, reference):
    """A prompt, its greedy output, and the place in it of an id that did not occur before."""
    for prompt in prompts[4:]:
        output = reference.greedy(prompt, TOKENS)
        place = next((i for i in range(5, TOKENS - 5) if output[i] not in output[:i]), None)
        if place is not None and len(output) == TOKENS:
            return prompt, output, place
    raise AssertionError("the demo target only repeats itself")


@pytest.fixture(scope="module")
def configured(launch, tmp_path_factory, ending):
    """Returns the target configured by environment variables, with an end-of-sequence id of its own; a living one."""
    _, output, place = ending
    model = tmp_path_factory.mktemp("configured")
    for file in (DEMO / "target").iterdir():
        if file.name != "generation_config.json":
            (model / file.name).symlink_to(file)
    generation = {"eos_token_id": [0, output[place]], "pad_token_id": 0}
    (model / "generation_config.json").write_text(json.dumps(generation))
    settings = {
        "MODEL": str(model),
        "LISTEN": "127.0.0.1:0",
        "THREADS": "1",
        "DTYPE": "fp32",
        "SLOTS": "5",
        "MAX_LENGTH": "300",
        "VERIFY_WIDTH": "5",
        "ATTN_IMPLEMENTATION": "eager",
        "QUEUE": "1",
        "QUEUE_TIMEOUT": "0.5",
        "GRACE": "60",
    }
    started = []

    def living():
        if not started or not started[-1].alive:
            env = {f"SPECPAIR_TARGET_{name}": value for name, value in settings.items()}
            started.append(launch("target", "--slots=3", listen=False, env=env))
        return started[-1]

    return living


class TestConfigured:
    """A target that environment variables configure."""

    def test_environment(self, configured):
        """Each variable counts; a flag goes before it."""
        info = configured().info()
        assert (info.dtype, info.max_length, info.verify_width) == ("fp32", 300, 5)
        assert (info.slots, info.attn_implementation) == (3, "eager")

    def test_own_end_of_sequence(self, configured, ending, draft):
        """The model's own end-of-sequence id ends the output inside a block; `ignore_eos` goes on through it."""
        prompt, output, place = ending
        target = configured().address

        async def generate(draft, **params):
            async with SpeculativeClient(target, draft) as client:
                return await client.generate(prompt, SamplingParams(max_new_tokens=TOKENS, **params))

        with serving(prophet({prompt: output})) as fake:
            for proposer in (fake.address, "ngram", "none"):
                result = run(generate(proposer))
                assert result.token_ids == output[: place + 1]
                assert result.finish_reason is FinishReason.STOP_TOKEN
                result = run(generate(proposer, ignore_eos=True))
                assert result.token_ids == output
                assert result.finish_reason is FinishReason.MAX_NEW_TOKENS
        with pytest.raises(DraftMismatchError) as caught:
            run(generate(draft.address))
        assert caught.value.field == "draft.fingerprint.eos_token_ids"

    def test_overload(self, configured, ending):
        """With every slot in use a request is refused: in the queue after a while, behind a full queue at once."""
        prompt, output, place = ending
        target = configured()

        async def check():
            async with target_stub(target.address) as stub, SpeculativeClient(target.address, "none") as client:
                holders = [await RawSession.open(stub, prompt) for _ in range(3)]
                requests = [asyncio.create_task(client.generate(prompt)) for _ in range(3)]
                outcomes = await asyncio.gather(*requests, return_exceptions=True)
                assert {type(outcome) for outcome in outcomes} == {OverloadedError}
                assert sorted(outcome.reason for outcome in outcomes) == ["KV_SLOTS_EXHAUSTED"] + ["QUEUE_FULL"] * 2
                assert all(outcome.retry_after > 0 for outcome in outcomes)
                for holder in holders:
                    assert await holder.run() == list(output[: place + 1])
                assert (await client.generate(prompt)).token_ids == output[: place + 1]

        run(check())
        target.wait_until_free()

    def test_drain(self, configured, ending):
        """SIGTERM: health says NOT_SERVING, nothing new is taken, what runs finishes, and the process ends with 0."""
        prompt, output, _ = ending
        target = configured()
        params = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)

        async def check():
            async with (
                grpc.aio.insecure_channel(target.address) as channel,
                SpeculativeClient(target.address, "ngram", draft_length=1) as pair,
                SpeculativeClient(target.address, "none") as alone,
                SpeculativeClient(target.address, "none") as late,
            ):
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=TARGET))
                assert (await watch.read()).status == SERVING
                async with pair.stream(prompt, params) as verified, alone.stream(prompt, params) as generated:
                    await anext(verified)
                    await anext(generated)
                    target.send(signal.SIGTERM)
                    assert (await watch.read()).status == NOT_SERVING
                    # By then it may take no connection any more, which gives no reason; tests/serving has the reasons.
                    with pytest.raises(grpc.RpcError) as refused:
                        await target_pb2_grpc.TargetServiceStub(channel).Tokenize(target_pb2.TokenizeRequest())
                    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
                    # Whoever asks what the service is first learns there that it is not ready any more.
                    with pytest.raises(UnavailableError):
                        await late.generate(prompt, params)
                    for stream in (verified, generated):
                        async for _ in stream:
                            pass
                        assert stream.result.token_ids == output
                with contextlib.suppress(grpc.RpcError):
                    await watch.read()

        run(check())
        assert target.wait() == 0
        assert not leftovers(target.process.pid)
        events = [entry["event"] for entry in target.entries()]
        assert events.index("ready") < events.index("stopping") < events.index("stopped") == len(events) - 1
        [stopping] = [entry for entry in target.entries() if entry["event"] == "stopping"]
        assert stopping["signal"] == "SIGTERM"


class TestNgramService:
    """`specpair-draft --proposer ngram`: prompt lookup as a service, without a model."""

    @pytest.fixture
    def service(self, launch):
        return launch("draft", "--proposer=ngram")

    def test_life(self, service, bf16, prompts):
        """It proposes to a target of any vocabulary, keeps the tokens, and drains like the others."""
        info = service.info()
        assert info.proposers == [common_pb2.SOURCE_NGRAM]
        assert not info.HasField("fingerprint")
        prompt = prompts[7] + prompts[7]
        params = SamplingParams(max_new_tokens=32, ignore_eos=True)

        async def check():
            async with (
                SpeculativeClient(bf16.target.address, "none") as alone,
                SpeculativeClient(
                    bf16.target.address, service.address, draft_length=3, draft_timeout=UNHURRIED
                ) as pair,
            ):
                expected = (await alone.generate(prompt, params)).token_ids
                result = await pair.generate(prompt, params)
                assert result.token_ids == expected
                assert result.stats.proposed > 0
                assert not result.stats.proposer_changes
                assert set(result.stats.accepted_by_source) <= {Source.NGRAM}
                async with pair.stream(prompt, params) as stream:
                    await anext(stream)
                    service.send(signal.SIGTERM)
                    async for _ in stream:
                        pass
                    assert stream.result.token_ids == expected
                    assert not stream.stats.proposer_changes
                assert (await pair.generate(prompt, params)).token_ids == expected

        run(check())
        assert service.wait() == 0
        assert not leftovers(service.process.pid)

    def test_asked_of_a_model_service(self, bf16):
        """A draft service with a model looks the prompt up when asked to, and takes no slot for it."""

        async def check():
            async with grpc.aio.insecure_channel(bf16.draft.address) as channel:
                call = draft_pb2_grpc.DraftServiceStub(channel).Propose()
                start = draft_pb2.ProposeStart(token_ids=[5, 6, 7, 8, 5, 6], proposer=common_pb2.SOURCE_NGRAM)
                await call.write(draft_pb2.ProposeRequest(start=start))
                assert (await call.read()).started.proposer == common_pb2.SOURCE_NGRAM
                assert bf16.draft.info().slots_in_use == 0
                ask = draft_pb2.ProposeAsk(round=3, from_position=6, max_tokens=2)
                await call.write(draft_pb2.ProposeRequest(ask=ask))
                proposal = (await call.read()).proposal
                assert (proposal.round, proposal.base_length, proposal.source) == (3, 6, common_pb2.SOURCE_NGRAM)
                assert list(proposal.token_ids) == [7, 8]
                await call.done_writing()
                assert await call.read() is grpc.aio.EOF

        run(check())


@pytest.mark.parametrize(
    ("config", "address", "own"),
    [
        (TargetConfig, "127.0.0.1:50051", "[default: 8; SPECPAIR_TARGET_VERIFY_WIDTH]"),
        (DraftConfig, "127.0.0.1:50052", "[default: model; SPECPAIR_DRAFT_PROPOSER]"),
    ],
)
def test_help(config, address, own, capsys, monkeypatch):
    """`--help` of both services names every flag with its default and its environment variable."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        config.parse(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    prefix = config.model_config["env_prefix"]
    for default, variable in (
        (address, "LISTEN"),
        ("bf16", "DTYPE"),
        ("4", "SLOTS"),
        ("2048", "MAX_LENGTH"),
        ("none", "QUANTIZATION"),
        ("sdpa", "ATTN_IMPLEMENTATION"),
        ("auto", "COMPILE"),
        ("auto", "LOG_FORMAT"),
    ):
        assert f"[default: {default}; {prefix}{variable}]" in text
        assert f"--{variable.lower().replace('_', '-')} " in text
    assert f"{prefix}MODEL]" in text
    assert f"{prefix}THREADS]" in text
    assert own in text


class TestBufCurl:
    """A tool that knows nothing of the project gets along by reflection alone, as README's grpcurl session does."""

    @pytest.fixture(scope="class")
    @staticmethod
    def curl():
        """Runs `buf curl` on a service and returns its output."""
        local = Path(__file__).parents[2] / "node_modules" / ".bin" / "buf"
        buf = str(local) if local.exists() else shutil.which("buf")
        if buf is None:
            pytest.skip("buf is not installed: `npm ci` installs it")

        def call(service, path="", *arguments):
            command = [buf, "curl", "--protocol=grpc", "--http2-prior-knowledge", *arguments]
            done = subprocess.run(
                [*command, f"http://{service.address}{path}"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
                env=environment(),
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        return call

    def test_lists_services(self, curl, bf16):
        """`list` of both services."""
        assert {TARGET, "grpc.health.v1.Health"} <= set(curl(bf16.target, "", "--list-services").split())
        assert {"specpair.v1.DraftService", "grpc.health.v1.Health"} <= set(
            curl(bf16.draft, "", "--list-services").split()
        )

    def test_calls(self, curl, bf16):
        """GetModelInfo, Generate, a session by hand, and health."""
        info = json.loads(curl(bf16.target, f"/{TARGET}/GetModelInfo"))["info"]
        assert info["phase"] == "PHASE_READY"
        request = {"prompt": {"text": "import os\n"}, "sampling": {"maxNewTokens": 4}, "stop": {"ignoreEos": True}}
        started, *tokens = _objects(curl(bf16.target, f"/{TARGET}/Generate", "-d", json.dumps(request)))
        prompt = started["started"]["promptTokenIds"]
        assert len(tokens) == 4
        assert tokens[-1]["committed"]["finishReason"] == "FINISH_REASON_MAX_NEW_TOKENS"
        messages = [
            {"start": {"prompt": {"text": "import os\n"}}},
            {"block": {"round": 1, "baseLength": len(prompt)}},
            {"block": {"round": 2, "baseLength": len(prompt)}},
        ]
        data = " ".join(map(json.dumps, messages))
        started, applied, stale = _objects(curl(bf16.target, f"/{TARGET}/Verify", "-d", data))
        assert started["started"]["promptTokenIds"] == prompt
        assert applied["verdict"]["status"] == "STATUS_APPLIED"
        assert applied["verdict"]["committed"]["tokenIds"] == tokens[0]["committed"]["tokenIds"]
        assert stale["verdict"]["status"] == "STATUS_STALE"
        assert json.loads(curl(bf16.target, "/grpc.health.v1.Health/Check")) == {"status": "SERVING"}


def _objects(text):
    """JSON objects, one behind the other."""
    decoder, position = json.JSONDecoder(), 0
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        yield value
        position += len(text[position:]) - len(text[position:].lstrip())


def test_loopback_only(bf16):
    """The services listen where they are told to and nowhere else."""
    for service in (bf16.target, bf16.draft):
        port = int(service.address.rpartition(":")[2])
        addresses = {*_listening("/proc/net/tcp", port), *_listening("/proc/net/tcp6", port)}
        assert addresses
        assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}


def _listening(table, port):
    """Local addresses, as the kernel writes them, on which someone listens on a port."""
    for line in Path(table).read_text().splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        address, _, number = local.partition(":")
        if state == "0A" and int(number, 16) == port:
            yield address
