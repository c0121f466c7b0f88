"""Around every call: a request id, exceptions turned into statuses, one log line at the end, and a span if traced."""

from __future__ import annotations

import asyncio
import inspect
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
import structlog
from grpc_status import rpc_status

from specpair.errors import PUSHBACK, REQUEST_ID, InternalError, SpecpairError, to_status
from specpair.request_ids import request_id_of
from specpair_runtime.serving.attended import expired
from specpair_runtime.serving.calls import Calls
from specpair_runtime.serving.decoding import decoding
from specpair_runtime.serving.identity import identify
from specpair_runtime.serving.record import CallRecord
from specpair_runtime.serving.tracing import FAULTS, Tracing

# Health probes and tools: what they ask is of no interest until something is wrong.
_HEALTH = "/grpc.health."
_QUIET = (_HEALTH, "/grpc.reflection.")
# Answered in every phase, the drain included.
_INFO = "/GetModelInfo"

# In the path of a field: a number there may be a token id.
_INDEX = re.compile(r"\[\d+\]")

_CANCELLATION_LAG = 0.001  # seconds
_NUMBERS = {code.name: code.value[0] for code in grpc.StatusCode}
_NAMES = {number: name for name, number in _NUMBERS.items()}

_Context = grpc.aio.ServicerContext[Any, Any]
_Handler = Callable[[Any, _Context], Any]

Ended = Callable[[str, str, float, str], None]
"""Is told of every call at its end: method, status, seconds, and the reason of a refusal or failure, if it has one."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server, of all four kinds.

    - A SpecpairError ends the call with the status and the details that `specpair.errors` gives it.
    - Any other exception ends it with INTERNAL and a text that names the request id alone; the traceback is logged.
    - The request id comes from the metadata `x-request-id` or is made up; it stands on every log line of the call and
      goes back in the trailing metadata. Not in the initial metadata: those sent early would end gRPC's own retries.
    - One line per call is logged at its end: method, peer, status, seconds, the reason of an error that has one, and
      what was said to the call's record (`specpair_runtime.serving.record`). docs/logging.md lists all fields.
    - With `tracing` a call is a span with the same fields, and its log lines have the `trace_id`.
    - Calls are counted in `calls`, which refuses them from the drain on and ends those that are left; health is not.
    - Bytes that are no message end it with INVALID_ARGUMENT and the reason MALFORMED_MESSAGE.
    - `ended` is told of every call at its end, those that are denied included.
    - A response that the client does not take within `patience` seconds ends the call with UNAVAILABLE and the reason
      SESSION_EXPIRED; 0 waits for ever.
    """

    def __init__(
        self,
        calls: Calls | None = None,
        patience: float = 0.0,
        ended: Ended = lambda *_: None,
        tracing: Tracing | None = None,
    ) -> None:
        self._calls = calls or Calls()
        self._patience = patience or None
        self._ended = ended
        self._tracing = tracing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        wrap = partial(self._wrap, method, handler.request_deserializer)
        codecs = (None, handler.response_serializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(wrap(handler.unary_unary), *codecs)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(wrap(handler.unary_stream), *codecs)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(wrap(handler.stream_unary), *codecs)
        return grpc.stream_stream_rpc_method_handler(wrap(handler.stream_stream), *codecs)

    def _wrap(self, method: str, decode: Any, handler: Any) -> Any:  # noqa: ANN401
        answer = self._counted(method, decoding(handler, decode))

        # grpc's types know no handler that is a coroutine, nor one that writes to its context instead of yielding.
        async def call(request: Any, context: _Context) -> Any:  # noqa: ANN401
            return await _call(method, answer, request, context, self._ended, self._tracing)

        return call

    def _counted(self, method: str, handler: _Handler) -> Callable[[Any, _Context], Awaitable[Any]]:
        """The handler to its last response, as one of the server's calls."""

        async def answer(request: Any, context: _Context) -> Any:  # noqa: ANN401
            if method.startswith(_HEALTH):
                return await _answer(handler, request, context, self._patience)
            if self._calls.refusal is not None and not method.endswith(_INFO):
                raise self._calls.refusal
            async with self._calls.running():
                return await _answer(handler, request, context, self._patience)

        return answer


async def _call(
    method: str,
    answer: Callable[[Any, _Context], Awaitable[Any]],
    request: Any,  # noqa: ANN401
    context: _Context,
    ended: Ended,
    tracing: Tracing | None,
) -> Any:  # noqa: ANN401
    request_id = _request_id(context)
    # grpc.aio runs every call in a task of its own, so nothing has to be unbound.
    structlog.contextvars.bind_contextvars(request_id=request_id, method=method, peer=context.peer())
    if caller := identify(context):
        structlog.contextvars.bind_contextvars(caller=caller)
    record = CallRecord.open()
    quiet = method.startswith(_QUIET)
    span = None
    if tracing is not None and not quiet:
        span = tracing.grpc_call(method, context.invocation_metadata(), request_id)
        structlog.contextvars.bind_contextvars(trace_id=span.trace_id)
    log = structlog.get_logger("specpair.rpc")
    started = time.perf_counter()
    cancelled = False
    reason = ""
    # At once, for handlers that abort by themselves; again at the end, for those that set trailing metadata.
    context.set_trailing_metadata(_trailing(context, request_id))
    try:
        result = await answer(request, context)
        context.set_trailing_metadata(_trailing(context, request_id))
        if hasattr(request, "__aiter__"):
            # A client that cancels looks to a reading handler like one that has no more to say; the cancellation
            # itself arrives a moment later, in time to be logged as what it is.
            await asyncio.sleep(_CANCELLATION_LAG)
        return result
    except asyncio.CancelledError:
        cancelled = True
        raise
    except grpc.aio.AbortError:
        raise
    except SpecpairError as error:
        reason = error.reason
        if error.field:
            record.annotate({"field": _INDEX.sub("[]", error.field)})
        await _abort(context, error, request_id)
    except Exception:
        log.exception("unexpected error")
        await _abort(context, InternalError(f"internal error; the log has it as request {request_id}"), request_id)
    finally:
        seconds = round(time.perf_counter() - started, 6)
        status = _status(context, cancelled)
        ended(method, status, seconds, reason)
        if reason:
            record.annotate({"reason": reason})
        write = log.debug if quiet else log.info
        write("call", status=status, seconds=seconds, **record.fields())
        if span is not None:
            number = _NUMBERS.get(status, grpc.StatusCode.UNKNOWN.value[0])
            span.end({"rpc.grpc.status_code": number}, status if status in FAULTS else "", record)


async def _answer(
    handler: _Handler,
    request: Any,  # noqa: ANN401
    context: _Context,
    patience: float | None,
) -> Any:  # noqa: ANN401
    """The response of a unary handler, None after a stream. gRPC's flow control holds a stream back by its writes."""
    result = handler(request, context)
    if not inspect.isasyncgen(result):
        return await result
    # Iterated here rather than by grpc.aio, which may drop a generator without closing it: its `finally` runs before
    # the call ends, whichever way it ends.
    async with aclosing(result) as responses:
        async for response in responses:
            try:
                async with asyncio.timeout(patience):
                    await context.write(response)
            except TimeoutError:
                raise expired("the client does not take the answers") from None
    return None


async def _abort(context: _Context, error: SpecpairError, request_id: str) -> None:
    status = rpc_status.to_status(to_status(error))
    trailing = (*_trailing(context, request_id), *status.trailing_metadata)
    if error.retry_after is not None:
        # What gRPC's own retries go by.
        trailing = (*trailing, (PUSHBACK, str(round(error.retry_after * 1000))))
    await context.abort(status.code, status.details, trailing)


def _trailing(context: _Context, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    others = [(key, value) for key, value in context.trailing_metadata() or () if key != REQUEST_ID]
    return (*others, (REQUEST_ID, request_id))


def _request_id(context: _Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID:
            return request_id_of(value)
    return request_id_of()


def _status(context: _Context, cancelled: bool) -> str:
    if cancelled:
        # The runtime announces a deadline that passed as a cancellation.
        return "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
    # A status code, or its number; 0 or None before one is set.
    code = context.code() or grpc.StatusCode.OK
    return code.name if isinstance(code, grpc.StatusCode) else _NAMES.get(code, str(code))
