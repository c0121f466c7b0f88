"""The application: OpenAI's endpoints over a client."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from specpair import SpecpairError, SpeculativeClient
from specpair_gateway.attendance import Disconnected, EventStream, while_connected
from specpair_gateway.calls import HEALTH, Calls, current_request_id
from specpair_gateway.chat import ChatFormat
from specpair_gateway.completions import CompletionFormat
from specpair_gateway.config import GatewayConfig
from specpair_gateway.formats import Format
from specpair_gateway.generations import Generations
from specpair_gateway.metrics import RequestMetrics
from specpair_gateway.models import ServedModels
from specpair_gateway.problems import Problem, describe_http, describe_validation, internal, problem
from specpair_gateway.requests import ChatRequest, CompletionRequest, GenerationRequest
from specpair_gateway.vocabulary import Vocabulary
from specpair_runtime.serving.auth import accepted_tokens
from specpair_runtime.serving.tracing import Tracing

__all__ = ["create_app"]

# Nginx's word for a request that nobody waits for any more; it is in no answer, for the same reason.
_CLIENT_GONE = 499
_DONE = b"data: [DONE]\n\n"

_log = structlog.stdlib.get_logger("specpair")


def create_app(
    config: GatewayConfig,
    client: SpeculativeClient,
    metrics: RequestMetrics | None = None,
    tracing: Tracing | None = None,
) -> ASGIApp:
    """The whole gateway, for an ASGI server; it closes the client when it ends.

    Raises InvalidRequestError naming `api_keys` for a file of keys that cannot be used.
    """
    keys = accepted_tokens(config.api_keys, "api_keys") if config.api_keys else None

    @contextlib.asynccontextmanager
    async def closing(_: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = FastAPI(
        lifespan=closing,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # `Calls` makes the spans. FastAPI's own are there for health too, and its records quote exceptions.
        telemetry={"tracing": False, "logs": False},
    )
    _Endpoints(config, client).add_to(app)
    app.add_exception_handler(SpecpairError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Disconnected, _answer_nobody)
    return Calls(app, max_body=config.max_body, keys=keys, metrics=metrics, tracing=tracing)


class _Endpoints:
    def __init__(self, config: GatewayConfig, client: SpeculativeClient) -> None:
        self._config = config
        self._client = client
        self._models = ServedModels(client, config.model_names)

    def add_to(self, app: FastAPI) -> None:
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.complete)
        app.api_route(HEALTH, methods=["GET", "HEAD"])(self.health)  # the server leaves the body of HEAD out

    async def models(self) -> JSONResponse:
        names = await self._models.names()
        return JSONResponse({"object": "list", "data": [self._models.describe(name) for name in names]})

    async def model(self, name: str) -> JSONResponse:
        await self._models.check(name)
        return JSONResponse(self._models.describe(name))

    async def health(self) -> JSONResponse:
        target, draft = await self._client.healthy()
        status = HTTPStatus.OK if target else HTTPStatus.SERVICE_UNAVAILABLE
        said = {"status": "ok" if target else "unavailable", "target": target, "draft": draft}
        return JSONResponse(said, status)

    async def chat(self, request: Request, asked: ChatRequest) -> Response:
        return await self._answer(request, asked, ChatFormat)

    async def complete(self, request: Request, asked: CompletionRequest) -> Response:
        return await self._answer(request, asked, CompletionFormat)

    async def _answer(self, request: Request, asked: GenerationRequest, form: type[Format]) -> Response:
        request.state.names = asked.names
        await self._models.check(asked.model)
        jobs = asked.jobs(self._config.max_choices)
        first = jobs[0].params
        vocabulary = None if first.logprobs is None else Vocabulary(self._client)
        answer = form(asked.model, asked.choices, first.seed, vocabulary)
        running = Generations(self._client, jobs, self._config.timeout or None, current_request_id())
        if not asked.stream:
            async with while_connected(request.receive):
                async with running:
                    async for _ in running:
                        pass
                whole = await answer.whole(running.results)
            _note(running)
            return JSONResponse(whole)
        pieces = answer.pieces(running, with_usage=asked.include_usage)
        # What goes wrong before the first token is an answer with a status of its own.
        async with while_connected(request.receive):
            opening = await anext(pieces)
        events = _events(opening, pieces, running, asked.names)
        return EventStream(events, pieces, self._config.stall_timeout or None)


async def _events(
    opening: dict[str, Any],
    pieces: AsyncGenerator[dict[str, Any]],
    running: Generations,
    names: dict[str, str],
) -> AsyncGenerator[bytes]:
    """The events of a stream, the last one being an error if there is one."""
    yield _event(opening)
    try:
        async for piece in pieces:
            yield _event(piece)
    except SpecpairError as error:
        yield _event(_problem(error, names).body)
    except Exception:
        _log.exception("unexpected error in a stream")
        yield _event(internal(current_request_id()).body)
    else:
        _note(running)
        yield _DONE


def _event(content: dict[str, Any]) -> bytes:
    # The separators and characters of JSONResponse.
    return (
        b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
    )


def _note(running: Generations) -> None:
    """Adds counts to the request's log line."""
    stats = [result.stats for result in running.results]
    structlog.contextvars.bind_contextvars(
        choices=len(stats),
        prompt_tokens=sum(one.prompt_tokens for one in stats),
        output_tokens=sum(one.output_tokens for one in stats),
        accepted=sum(one.accepted for one in stats),
    )


def _problem(error: SpecpairError, names: dict[str, str]) -> Problem:
    found = problem(error, current_request_id(), names)
    if found.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        kind = type(error).__name__
        _log.warning(
            "a service failed", error=f"{kind}: {error}", reason=error.reason, service_request=error.request_id
        )
    return found


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SpecpairError), "registered for it"
    return _problem(error, getattr(request.state, "names", {})).response


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "registered for it"
    return problem(describe_validation(error.errors()), current_request_id()).response


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    return describe_http(error.status_code, error.detail, error.headers).response


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)
