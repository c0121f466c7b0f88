"""Old and new versions understand each other: what docs/compatibility.md says of the protocol."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from specpair import wire
from specpair.errors import ProtocolError, UnsupportedError
from specpair.messages import Phase
from specpair.results import Source
from specpair.v1 import common_pb2, draft_pb2, target_pb2

ROOT = Path(__file__).resolve().parent.parent
BUF = ROOT / "node_modules/.bin/buf"
RELEASED = ROOT / "protos/released.binpb"
# Field 4000 of the wire type "length-delimited", with two bytes in it: no message here has one.
UNKNOWN = b"\x82\xfa\x01\x02hi"
needs_buf = pytest.mark.skipif(not BUF.exists(), reason="buf is not installed: `make check` installs it with npm")


def _compare(protos: Path) -> tuple[int, str]:
    done = subprocess.run([BUF, "breaking", protos, "--against", RELEASED], check=False, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@needs_buf
def test_the_protos_break_nothing():
    """The protos keep everything that the released ones have."""
    assert _compare(ROOT / "protos") == (0, "")


BREAKS = {
    "a field goes away": ("draft", "  repeated uint32 token_ids = 1;\n", "  reserved 1;\n"),
    "a number changes": ("draft", "uint32 max_tokens = 4;", "uint32 max_tokens = 40;"),
    "a name changes": ("draft", "uint32 max_tokens = 4;", "uint32 most_tokens = 4;"),
    "a type changes": ("draft", "uint32 max_tokens = 4;", "string max_tokens = 4;"),
    "a method goes away": (
        "target",
        "  rpc Tokenize(TokenizeRequest) returns (TokenizeResponse);\n",
        "",
    ),
    "a method answers otherwise": ("target", "returns (stream VerifyResponse)", "returns (VerifyResponse)"),
    "a value changes its number": ("common", "SOURCE_NGRAM = 3;", "SOURCE_NGRAM = 33;"),
    "a reserved number is free again": ("draft", "  reserved 5;\n", ""),
    "a field leaves its oneof": (
        "draft",
        "  oneof message {\n    ProposeStart start = 1;",
        "  ProposeStart start = 1;\n  oneof message {",
    ),
}


@needs_buf
@pytest.mark.parametrize("change", BREAKS)
def test_a_break_is_found(tmp_path, change):
    """Whatever an old client or service would stumble over does not pass."""
    name, before, after = BREAKS[change]
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    proto = tmp_path / f"protos/specpair/v1/{name}.proto"
    text = proto.read_text()
    assert before in text
    proto.write_text(text.replace(before, after, 1))
    status, said = _compare(tmp_path / "protos")
    assert status != 0
    assert f"specpair/v1/{name}.proto" in said


@needs_buf
def test_additions_pass(tmp_path):
    """A new field, value, message and method are no break."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    common, target = (tmp_path / f"protos/specpair/v1/{name}.proto" for name in ("common", "target"))
    common.write_text(common.read_text().replace("SOURCE_NGRAM = 3;", "SOURCE_NGRAM = 3;\n  SOURCE_ORACLE = 99;"))
    method = "  rpc Verify(stream VerifyRequest)"
    changed = target.read_text().replace(method, f"  rpc Ask(AskRequest) returns (AskResponse);\n{method}")
    target.write_text(f"{changed}\nmessage AskRequest {{}}\n\nmessage AskResponse {{\n  string answer = 1;\n}}\n")
    assert _compare(tmp_path / "protos") == (0, "")


def test_the_client_ignores_fields_of_newer_services():
    """An answer with a field that the client does not know reads like one without it."""
    verdict = target_pb2.Verdict(round=3, status=target_pb2.Verdict.STATUS_APPLIED, base_length=7, accepted=2)
    plain = target_pb2.VerifyResponse(verdict=verdict)
    newer = target_pb2.VerifyResponse.FromString(
        target_pb2.VerifyResponse(
            verdict=target_pb2.Verdict.FromString(verdict.SerializeToString() + UNKNOWN)
        ).SerializeToString()
        + UNKNOWN
    )
    assert newer != plain
    assert wire.verify_response(newer) == wire.verify_response(plain)


def test_the_client_takes_values_of_newer_services_for_what_informs():
    """An unknown phase is none, an unknown proposer of a draft service is a model; an unknown end is an error."""
    info = wire.model_info(common_pb2.ModelInfo(phase=99, proposers=[common_pb2.SOURCE_NGRAM, 99]))
    assert (info.phase, info.proposers) == (Phase.UNSPECIFIED, (Source.NGRAM,))
    proposal = draft_pb2.ProposeResponse(proposal=draft_pb2.Proposal(round=1, base_length=4, token_ids=[5], source=99))
    assert wire.propose_response(proposal).source is Source.MODEL
    ending = common_pb2.CommittedTokens(token_ids=[5], text_lengths=[0], finish_reason=99)
    with pytest.raises(ProtocolError, match="finish reason"):
        wire.generate_response(target_pb2.GenerateResponse(committed=ending))


def test_services_ignore_fields_and_refuse_rules_of_newer_clients():
    """A field that a service does not know changes nothing; a rule that it does not know is refused by name."""
    from specpair_runtime.wire import read_sampling  # loads torch

    params = common_pb2.SamplingParams(temperature=0.5, seed=3)
    newer = common_pb2.SamplingParams.FromString(params.SerializeToString() + UNKNOWN)
    assert newer != params
    assert read_sampling(newer, 100, "sampling") == read_sampling(params, 100, "sampling")
    with pytest.raises(UnsupportedError) as refused:
        read_sampling(common_pb2.SamplingParams(rule=99), 100, "sampling")
    assert refused.value.field == "sampling.rule"
