"""Coverage-guided fuzzing of what reads requests, with atheris: `python -m tests.fuzz.readers -max_total_time=60`.

Each run changes an empty request in as many places as its bytes say, and reads it as the services do. It must be read,
or refused with an error that names a field of the request.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import atheris

with atheris.instrument_imports(include=["specpair_target.wire", "specpair_draft.wire", "specpair_runtime.wire"]):
    from specpair_draft import wire as draft_wire
    from specpair_runtime import wire as common_wire
    from specpair_target import wire as target_wire

from specpair.errors import SpecpairError
from specpair.v1 import draft_pb2, target_pb2
from specpair_target.prompts import Prompts

from .schema import Change, changes, exists

_VOCABULARY, _LENGTH = 211, 64
_LIMITS = target_wire.Limits(_VOCABULARY, _LENGTH, 7, frozenset({2}))
_PROMPTS = Prompts(None, _LENGTH, _VOCABULARY)
_MOST_CHANGES = 6


def _start(request: target_pb2.VerifyRequest) -> None:
    start = request.start
    target_wire.read_turn(start, _LIMITS, text=True, prefix="start.")
    prompt = target_wire.read_prompt(start.prompt, _PROMPTS, _LIMITS, "start.prompt")
    target_wire.read_committed(start.committed_token_ids, len(prompt.token_ids), _LIMITS, "start.committed_token_ids")


def _block(rule: int, request: target_pb2.VerifyRequest) -> None:
    sampling = target_pb2.GenerateRequest(sampling={"rule": rule}).sampling
    target_wire.read_blocks(request.block, common_wire.read_sampling(sampling, _VOCABULARY, "sampling"), _LIMITS)


def _explain(request: target_pb2.ExplainVerifyRequest) -> None:
    target_wire.check_proposal(request.token_ids, _LIMITS, "token_ids")
    sampling = common_wire.read_sampling(request.sampling, _VOCABULARY, "sampling")
    target_wire.read_draft_probs(request, sampling, _LIMITS, "")


@dataclass(frozen=True)
class _Reader:
    read: Callable[[Any], object]
    request: type[Any]
    changes: list[Change] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "changes", [change for _, change in changes(self.request.DESCRIPTOR)])


def _readers() -> list[_Reader]:
    return [
        _Reader(_start, target_pb2.VerifyRequest),
        _Reader(partial(_block, 1), target_pb2.VerifyRequest),
        _Reader(partial(_block, 2), target_pb2.VerifyRequest),
        _Reader(_explain, target_pb2.ExplainVerifyRequest),
        _Reader(
            lambda request: target_wire.check_detokenizable(request.token_ids, _LIMITS), target_pb2.DetokenizeRequest
        ),
        _Reader(lambda request: draft_wire.read_turn(request.start, _VOCABULARY), draft_pb2.ProposeRequest),
        _Reader(lambda request: draft_wire.read_turn(request.start, None), draft_pb2.ProposeRequest),
        _Reader(lambda request: draft_wire.read_ask(request, 9, _VOCABULARY), draft_pb2.ProposeRequest),
    ]


def _run(readers: list[_Reader], data: bytes) -> None:
    chosen = atheris.FuzzedDataProvider(data)
    reader = readers[chosen.ConsumeIntInRange(0, len(readers) - 1)]
    request = reader.request()
    for _ in range(chosen.ConsumeIntInRange(0, _MOST_CHANGES)):
        reader.changes[chosen.ConsumeIntInRange(0, len(reader.changes) - 1)](request)
    try:
        reader.read(request)
    except SpecpairError as error:
        if not exists(error.field, request.DESCRIPTOR):
            raise AssertionError(f"names no field: {error!r}") from error


if __name__ == "__main__":
    atheris.Setup(sys.argv, partial(_run, _readers()))
    atheris.Fuzz()
