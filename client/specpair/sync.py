"""The client without asyncio: the same core, run by an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from specpair.client import DEFAULT_DRAFT, DEFAULT_TARGET, ClientOptions, SpeculativeClient
from specpair.messages import ModelInfo
from specpair.params import Prediction, Prompt, SamplingParams
from specpair.results import Chunk, PositionExplanation, Result, Stats, Token
from specpair.session import Session
from specpair.stream import TokenStream

__all__ = ["SyncSession", "SyncSpeculativeClient", "SyncTokenStream"]

T = TypeVar("T")


class SyncSpeculativeClient:
    """`SpeculativeClient` for code without an event loop; see there for what the arguments mean.

    May be used by several threads at once. Close it, or use it in a `with` block.
    """

    def __init__(
        self, target: str = DEFAULT_TARGET, draft: str = DEFAULT_DRAFT, **options: Unpack[ClientOptions]
    ) -> None:
        self._client = SpeculativeClient(target, draft, **options)
        self._loop = _LoopThread()

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prediction: Prediction | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Result:
        """Continues a prompt; see SpeculativeClient.generate."""
        return self._loop.run(
            self._client.generate(prompt, params, prediction=prediction, timeout=timeout, request_id=request_id)
        )

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prediction: Prediction | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> SyncTokenStream:
        """Continues a prompt, chunk by chunk; see SpeculativeClient.stream."""
        stream = self._client.stream(prompt, params, prediction=prediction, timeout=timeout, request_id=request_id)
        return SyncTokenStream(stream, self._loop)

    def session(self, *, request_id: str | None = None) -> SyncSession:
        """Several turns on one KV cache: `with client.session() as session`; see SpeculativeClient.session."""
        return SyncSession(self._client.session(request_id=request_id), self._loop)

    def explain(
        self,
        prompt: Prompt,
        proposal_token_ids: Sequence[int] | None = None,
        params: SamplingParams | None = None,
    ) -> tuple[PositionExplanation, ...]:
        """Why the target would accept or reject a proposal; see SpeculativeClient.explain."""
        return self._loop.run(self._client.explain(prompt, proposal_token_ids, params))

    def info(self) -> tuple[ModelInfo, ModelInfo | None]:
        """What the target and the draft run."""
        return self._loop.run(self._client.info())

    def healthy(self) -> tuple[bool, bool | None]:
        """Whether the target and the draft report to be serving."""
        return self._loop.run(self._client.healthy())

    def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt."""
        return self._loop.run(self._client.tokenize(prompt))

    def detokenize(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self._loop.run(self._client.detokenize(token_ids, keep_special_tokens=keep_special_tokens))

    def close(self) -> None:
        """Closes the connections and ends the thread. Does nothing the second time."""
        if self._loop.running:
            self._loop.run(self._client.aclose())
            self._loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SyncSession:
    """`Session` for code without an event loop. Close it, or use it in a `with` block."""

    def __init__(self, session: Session, loop: _LoopThread) -> None:
        self._session = session
        self._loop = loop

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prediction: Prediction | None = None,
        timeout: float | None = None,
    ) -> Result:
        """The next turn; see Session.generate."""
        return self._loop.run(self._session.generate(prompt, params, prediction=prediction, timeout=timeout))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prediction: Prediction | None = None,
        timeout: float | None = None,
    ) -> SyncTokenStream:
        """The next turn, chunk by chunk; see Session.stream."""
        return SyncTokenStream(self._session.stream(prompt, params, prediction=prediction, timeout=timeout), self._loop)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens of the session so far, prompts and outputs."""
        return self._session.token_ids

    @property
    def request_id(self) -> str:
        """Under which the logs of both services have the session, and the results of all of its turns."""
        return self._session.request_id

    def close(self) -> None:
        """Ends both streams, which frees their slots; a turn that another thread runs fails."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop.running:
            self._loop.run(self._session.__aexit__(kind, error, trace))


class SyncTokenStream:
    """The chunks of one generation: `for chunk in stream`. Leaving a `with` block or `close` ends the calls."""

    def __init__(self, stream: TokenStream, loop: _LoopThread) -> None:
        self._stream = stream
        self._loop = loop

    @property
    def result(self) -> Result:
        """The whole generation. Raises RuntimeError before its end."""
        return self._stream.result

    @property
    def request_id(self) -> str:
        """Under which the logs of both services have the generation."""
        return self._stream.request_id

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The output so far."""
        return self._stream.tokens

    @property
    def stats(self) -> Stats:
        """Statistics so far."""
        return self._stream.stats

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        chunk = self._loop.run(self._next())
        if chunk is None:
            raise StopIteration
        return chunk

    async def _next(self) -> Chunk | None:
        return await anext(self._stream, None)

    def close(self) -> None:
        """Ends the calls to both services."""
        if self._loop.running:
            self._loop.run(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _LoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=asyncio.run, args=(_serve(ready),), name="specpair", daemon=True)
        self._thread.start()
        self._loop, self._done = ready.result()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine. An interrupt of the waiting thread cancels it."""
        if not self.running:
            work.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()


async def _serve(ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    done = asyncio.Event()
    ready.set_result((asyncio.get_running_loop(), done))
    await done.wait()
