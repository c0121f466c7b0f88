"""The application over an in-memory target, asked by httpx or message by message."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx

from specpair import SpeculativeClient
from specpair_gateway.app import create_app
from specpair_gateway.config import GatewayConfig

from ..client.fakes import FakeTarget

MODEL = "target"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Stands for "does not hang", in seconds.
_BOUND = 30


def client_of(target, draft="ngram", **options):
    """A client of an in-memory target that is not waited for when it is lost."""
    return SpeculativeClient("target:1", draft, target_transport=target, resume_timeout=0.0, **options)


def application(target=None, draft="ngram", client=None, **config):
    """The gateway in front of it."""
    return create_app(GatewayConfig(**config), client_of(target or FakeTarget(), draft, **(client or {})))


def run(work):
    """Runs a coroutine to its end."""

    async def bounded():
        async with asyncio.timeout(_BOUND):
            return await work

    return asyncio.run(bounded())


@contextlib.asynccontextmanager
async def caller(app):
    """An HTTP client of the application."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway") as http:
        yield http


def ask(app, path, body=None, headers=None, method=None):
    """The answer to one request."""

    async def once():
        async with caller(app) as http:
            return await http.request(method or ("GET" if body is None else "POST"), path, json=body, headers=headers)

    return run(once())


def completion(**fields):
    """A request of few tokens."""
    return {"model": MODEL, "prompt": [3, 4, 5], "max_tokens": 12, **fields}


def chat(**fields):
    """The same as a conversation."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, **fields}


def events(answer):
    """The JSON of a stream's events, and whether it ended as it should."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    *lines, last = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in (*lines, last))
    done = last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in (lines if done else (*lines, last))], done


class Exchange:
    """One request, whose client takes at most so many messages of the answer, and stays until `gone` is set."""

    def __init__(self, app, path, body):
        self._app = app
        self._request = {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
        }
        self.sent = []
        self.most = 10**9
        self.gone = asyncio.Event()

    async def __call__(self):
        """Runs the application to its end."""
        await self._app(self.scope, self._receive, self._send)

    async def _receive(self):
        if self._request is not None:
            request, self._request = self._request, None
            return request
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        if len(self.sent) >= self.most:
            await asyncio.Event().wait()  # for ever
        self.sent.append(message)


async def settle(turns=300):
    """Lets everything go on that does not wait for anybody outside."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def until(condition):
    """Lets everything go on until something is so."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came")
