"""Whatever a request says, its answer is a documented one and nobody else notices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specpair.v1 import common_pb2, draft_pb2, target_pb2

from ..amounts import examples
from .calls import outcome
from .conftest import PROMPT, SAMPLING
from .schema import changed, changes, requests

_TEXT = common_pb2.Prompt(text=PROMPT)
_IDS = common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=[5, 6, 7]))
_CHAT = common_pb2.Prompt(chat=common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="Hi")]))
_REJECTION = common_pb2.SamplingParams(max_new_tokens=4, temperature=1.0, rule=common_pb2.ACCEPTANCE_RULE_REJECTION)
_SURE = [common_pb2.SparseDistribution(token_ids=[id_], probs=[1.0]) for id_ in (1, 2)]


def _start(prompt: common_pb2.Prompt, sampling: common_pb2.SamplingParams = SAMPLING) -> target_pb2.VerifyRequest:
    return target_pb2.VerifyRequest(start=target_pb2.SessionStart(prompt=prompt, sampling=sampling))


@dataclass(frozen=True)
class Method:
    """A method, and requests that are valid as its first one or as a later one."""

    role: str
    name: str
    valid: tuple[Message, ...]

    @property
    def service_name(self) -> str:
        return f"{self.role.title()}Service"

    @property
    def _descriptor(self) -> Any:
        module = {"target": target_pb2, "draft": draft_pb2}[self.role]
        return module.DESCRIPTOR.services_by_name[self.service_name].methods_by_name[self.name]

    @property
    def streams(self) -> bool:
        return bool(self._descriptor.client_streaming)

    def send(self, subjects, *messages):
        """How a call with these messages ends."""
        method = self._descriptor
        response = GetMessageClass(method.output_type)
        service = subjects[self.role].service
        return outcome(service, self.service_name, self.name, messages, response, method.input_type)


METHODS = {
    method.name: method
    for method in (
        Method(
            "target",
            "Verify",
            (
                _start(_TEXT),
                _start(_IDS),
                _start(_CHAT),
                _start(_IDS, _REJECTION),
                target_pb2.VerifyRequest(block=target_pb2.Block(round=1, base_length=3, token_ids=[1, 2])),
                target_pb2.VerifyRequest(block=target_pb2.Block(base_length=3, token_ids=[1, 2], draft_probs=_SURE)),
                target_pb2.VerifyRequest(extend=target_pb2.SessionExtend(prompt=_IDS, sampling=SAMPLING)),
            ),
        ),
        Method("target", "Generate", (target_pb2.GenerateRequest(prompt=_TEXT, sampling=SAMPLING),)),
        Method("target", "Tokenize", (target_pb2.TokenizeRequest(prompt=_TEXT),)),
        Method("target", "Detokenize", (target_pb2.DetokenizeRequest(token_ids=[5, 6]),)),
        Method(
            "target",
            "ExplainVerify",
            (target_pb2.ExplainVerifyRequest(prompt=_IDS, token_ids=[1, 2], sampling=SAMPLING),),
        ),
        Method("target", "GetModelInfo", (target_pb2.TargetServiceGetModelInfoRequest(),)),
        Method(
            "draft",
            "Propose",
            (
                draft_pb2.ProposeRequest(start=draft_pb2.ProposeStart(token_ids=[5, 6, 7], sampling=SAMPLING)),
                draft_pb2.ProposeRequest(start=draft_pb2.ProposeStart(token_ids=[5, 6, 7], sampling=_REJECTION)),
                draft_pb2.ProposeRequest(ask=draft_pb2.ProposeAsk(round=1, from_position=3, max_tokens=4)),
                draft_pb2.ProposeRequest(ask=draft_pb2.ProposeAsk(from_position=3, max_tokens=64, proposals=16)),
            ),
        ),
    )
}


@pytest.fixture
def subject(subjects, name):
    """The service of a method. Afterwards a good request is answered as it was before, and no slot is in use."""
    tested = subjects[METHODS[name].role]
    before = tested.ask(tested.service)
    assert before
    yield tested
    tested.still_well(before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("subject")
def test_every_field_at_its_extremes(subjects, name):
    """One field of a valid request at a time, each of them at each of its extremes; streams get a valid start first."""
    method = METHODS[name]
    first = method.valid[0].SerializeToString()
    # Of every member of a oneof one request.
    members = {request.WhichOneof("message") if method.streams else "": request for request in reversed(method.valid)}
    for member, request in members.items():
        for path, change in changes(request.DESCRIPTOR):
            if path.startswith(member):
                data = changed(request, [change])
                method.send(subjects, *([data] if member in ("", "start") else [first, data]))


@pytest.mark.parametrize("name", METHODS)
def test_anything(subjects, subject, name):
    """Any number of fields, messages out of order and twice, several members at once, bytes that are no message."""
    method = METHODS[name]
    one = requests(method.valid)
    script = st.lists(one, max_size=6) if method.streams else st.tuples(one)
    before = subject.ask(subject.service)

    @settings(max_examples=-(-examples(60) // len(METHODS)), suppress_health_check=list(HealthCheck))
    @given(script)
    def check(messages):
        method.send(subjects, *messages)
        subject.still_well(before)

    check()
