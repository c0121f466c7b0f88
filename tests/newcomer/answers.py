"""What the documented grpcurl calls are answered with."""

from __future__ import annotations

import json

# The name that docs/security.md gives to grpcurl with credentials.
NAMES = {"grpcurl", "as_alice"}


def objects(text):
    """JSON objects, one behind the other."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


def _services(text):
    assert {"specpair.v1.TargetService", "grpc.health.v1.Health"} <= set(text.split())


def _info(text):
    [answer] = objects(text)
    assert answer["info"]["phase"] == "PHASE_READY"


def _generated(text):
    started, *rest = objects(text)
    assert len(started["started"]["promptTokenIds"]) == started["started"]["length"]
    assert sum(len(one["committed"]["tokenIds"]) for one in rest) == 8
    assert rest[-1]["committed"]["finishReason"] == "FINISH_REASON_MAX_NEW_TOKENS"


def _judged(text):
    started, judged = objects(text)
    assert started["started"]["length"] == 3, "the documentation says that the prompt has three tokens"
    assert judged["verdict"]["status"] == "STATUS_APPLIED"
    assert len(judged["verdict"]["committed"]["tokenIds"]) == 1


def _proposed(text):
    started, answer = objects(text)
    assert started["started"]["proposer"] == "SOURCE_MODEL"
    assert len(answer["proposal"]["tokenIds"]) == 4


def _serving(text):
    assert objects(text) == [{"status": "SERVING"}]


# By what is called.
ANSWERS = {
    "list": _services,
    "specpair.v1.TargetService/GetModelInfo": _info,
    "specpair.v1.TargetService/Generate": _generated,
    "specpair.v1.TargetService/Verify": _judged,
    "specpair.v1.DraftService/Propose": _proposed,
    "grpc.health.v1.Health/Check": _serving,
}
