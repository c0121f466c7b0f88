"""Exceptions become statuses, and what they say becomes OpenAI's form."""

from __future__ import annotations

import math

import pytest

from specpair import (
    CancelledError,
    DeadlineError,
    DraftMismatchError,
    InternalError,
    InvalidRequestError,
    ModelLoadError,
    OverloadedError,
    ProtocolError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from specpair_gateway.problems import INVALID_API_KEY, MODEL_NOT_FOUND, problem

STATUSES = {
    InvalidRequestError: 400,
    UnsupportedError: 400,
    OverloadedError: 429,
    UnavailableError: 503,
    DeadlineError: 504,
    DraftMismatchError: 500,
    ModelLoadError: 500,
    CancelledError: 500,
    UnauthenticatedError: 500,
    ProtocolError: 500,
    InternalError: 500,
}
NAMES = {"prompt": "messages", "max_tokens": "max_completion_tokens", "logprobs": "top_logprobs"}


@pytest.mark.parametrize("kind", STATUSES)
def test_statuses(kind):
    """Every exception of the tree has one."""
    assert problem(kind("why"), "r1").status == STATUSES[kind]


@pytest.mark.parametrize("kind", [kind for kind, status in STATUSES.items() if status == 500])
def test_failures_tell_nothing(kind):
    """But under which id the log has them: their text may be about other requests, or about the machine."""
    said = problem(kind("secret", field="secret", reason="SECRET"), "r1").body["error"]
    assert said["type"] == "server_error"
    assert "r1" in said["message"]
    assert "secret" not in str(said).lower()


def test_addresses_are_not_told():
    """Why a service cannot be reached is in the log."""
    said = problem(UnavailableError("connect to 10.0.0.1 failed", field="x", reason="DRAINING"), "r1").body["error"]
    assert "r1" in said["message"]
    assert "10.0.0.1" not in str(said)
    assert (said["type"], said["param"], said["code"]) == ("service_unavailable_error", None, "draining")


def test_the_gateways_own():
    """An unknown model is not found, and an unknown caller is asked who it is."""
    unknown = problem(InvalidRequestError("no such model", field="model", reason=MODEL_NOT_FOUND), "r1")
    assert (unknown.status, unknown.param, unknown.code) == (404, "model", "model_not_found")
    denied = problem(UnauthenticatedError("no key", reason=INVALID_API_KEY), "r1")
    assert (denied.status, denied.code, denied.headers) == (401, "invalid_api_key", {"WWW-Authenticate": "Bearer"})


@pytest.mark.parametrize("kind", [OverloadedError, UnavailableError])
@pytest.mark.parametrize(
    ("seconds", "headers"),
    [
        (None, {"Retry-After": "1", "Retry-After-Ms": "1000"}),
        (0.2, {"Retry-After": "1", "Retry-After-Ms": "200"}),
        (2.4, {"Retry-After": "3", "Retry-After-Ms": "2400"}),
        (math.inf, {}),
    ],
)
def test_when_to_come_back(kind, seconds, headers):
    """In whole seconds, rounded up, and in milliseconds; not at all where no other try makes sense."""
    assert problem(kind("why", retry_after=seconds), "r1").headers == headers


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("", None),
        ("model", "model"),
        ("start.sampling.temperature", "temperature"),
        ("sampling.temperature", "temperature"),
        ("start.sampling.logit_bias[7]", "logit_bias[7]"),
        ("start.sampling.max_new_tokens", "max_completion_tokens"),
        ("start.sampling.min_new_tokens", "min_tokens"),
        ("start.stop.stop_strings[2]", "stop[2]"),
        ("start.stop.stop_token_ids[0]", "stop_token_ids[0]"),
        ("start.logprobs.top_n", "top_logprobs"),
        ("start.prompt.text", "messages"),
        ("start.prompt.token_ids.ids[3]", "messages[3]"),
        ("start.prompt.chat", "messages"),
        ("start.prompt.chat.messages", "messages"),
        ("start.prompt.chat.messages[1].role", "messages[1].role"),
        ("start.prompt", "messages"),
        ("prediction", "prediction"),
    ],
)
def test_fields_are_named_as_the_caller_knows_them(field, param):
    """Not as the protocol behind does, in the message too: not every client shows more of an error."""
    said = problem(InvalidRequestError("no", field=field), "r1", NAMES)
    assert said.param == param
    assert said.message == ("no" if param is None else f"{param}: no")
