"""A target and a draft service with tiny random models, to be thrown anything at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from specpair.v1 import common_pb2, draft_pb2, target_pb2

from ..e2e.processes import Service
from .calls import answers

# Positions of a slot: few, so that no accepted request takes long.
LENGTH = 64
PROMPT = "def naïve(x):"
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
SAMPLING = common_pb2.SamplingParams(max_new_tokens=8, temperature=0.9, seed=3)


@dataclass(frozen=True)
class Subject:
    """A service, and a request that it answers well: the same before and after whatever else it is sent."""

    service: Service
    ask: Callable[[Service], Any]

    def still_well(self, before: Any) -> None:
        """The process runs, no slot is in use, the good request is answered as it was before."""
        assert self.service.alive, self.service.text
        self.service.wait_until_free()
        assert self.ask(self.service) == before
        self.service.wait_until_free()


def _generated(service: Service) -> list[int]:
    request = target_pb2.GenerateRequest(prompt=common_pb2.Prompt(text=PROMPT), sampling=SAMPLING)
    responses = answers(
        service, "TargetService", "Generate", [request.SerializeToString()], target_pb2.GenerateResponse
    )
    return [id_ for response in responses for id_ in response.committed.token_ids]


def _proposed(service: Service) -> list[int]:
    start = draft_pb2.ProposeStart(token_ids=[1, 2, 3], sampling=SAMPLING)
    ask = draft_pb2.ProposeAsk(round=1, from_position=3, max_tokens=8)
    messages = [draft_pb2.ProposeRequest(start=start), draft_pb2.ProposeRequest(ask=ask)]
    sent = [message.SerializeToString() for message in messages]
    responses = answers(service, "DraftService", "Propose", sent, draft_pb2.ProposeResponse)
    return [id_ for response in responses for id_ in response.proposal.token_ids]


@pytest.fixture(scope="session")
def subjects(tiny, tmp_path_factory):
    """Both services, by role. In the end neither has logged an error, and neither has compiled anything since."""
    readable = tmp_path_factory.mktemp("fuzzed") / "target"
    shutil.copytree(tiny.path("llama-text"), readable)
    (readable / "chat_template.jinja").write_text(TEMPLATE)
    models = {"target": (readable, _generated), "draft": (tiny.path("llama-small"), _proposed)}
    flags = ["--dtype=fp32", "--slots=4", f"--max-length={LENGTH}"]
    made = {}
    try:
        for role, (model, ask) in models.items():
            log = tmp_path_factory.getbasetemp() / f"fuzzed-{role}.log"
            made[role] = Subject(Service(role, log, f"--model={model}", *flags), ask)
        yield made
        for subject in made.values():
            assert subject.service.info().recompilations == 0
            # gRPC remarks by itself on headers that it cannot read.
            ours = [entry for entry in subject.service.entries() if not entry["logger"].startswith("grpc.")]
            assert [entry for entry in ours if entry["level"] in ("error", "critical")] == []
    finally:
        for subject in made.values():
            subject.service.stop()
