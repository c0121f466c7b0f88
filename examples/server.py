"""A service of one's own on top of a pair: one client for all callers, and an answer piece by piece.

    python examples/server.py --listen 127.0.0.1:8100 --target 127.0.0.1:50051 --draft 127.0.0.1:50052

It takes lines of JSON over TCP, such as {"prompt": "def fibonacci(n):", "max_new_tokens": 32, "temperature": 0.7}, and
answers each with {"text": ...} as often as there is something new, and {"finish_reason": ..., "token_ids": [...]} or
{"error": ...} at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import math
import signal
from collections.abc import AsyncGenerator
from typing import Any

from specpair import InvalidRequestError, OverloadedError, SamplingParams, SpecpairError, SpeculativeClient

# Of SamplingParams, what callers may set.
FIELDS = {"max_new_tokens", "temperature", "seed", "stop"}
MOST_SECONDS = 60.0


async def converse(client: SpeculativeClient, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection. A caller that goes away ends its generation, and the slots of it are free."""
    try:
        while line := await reader.readline():
            async with contextlib.aclosing(answer(client, line)) as messages:
                async for message in messages:
                    writer.write(json.dumps(message).encode() + b"\n")
                    await writer.drain()  # a slow caller slows its own session, and nobody else
    except (ConnectionError, ValueError):  # gone, or a line that does not end
        pass
    except asyncio.CancelledError:  # the program ends
        pass
    finally:
        writer.close()


async def answer(client: SpeculativeClient, line: bytes) -> AsyncGenerator[dict[str, Any], None]:
    """What one line is answered with."""
    try:
        prompt, params = parse(line)
        async with client.stream(prompt, params, timeout=MOST_SECONDS) as stream:
            async for chunk in stream:
                if chunk.text:
                    yield {"text": chunk.text}
        result = stream.result
        yield {"finish_reason": result.finish_reason, "token_ids": list(result.token_ids)}
    except InvalidRequestError as error:
        yield {"error": "invalid", "field": error.field, "message": error.message}
    except OverloadedError as error:
        # Infinite where coming back is of no use: JSON has no number for that.
        later = error.retry_after if error.retry_after is not None and math.isfinite(error.retry_after) else None
        yield {"error": "overloaded", "reason": error.reason, "retry_after": later}
    except SpecpairError as error:
        yield {"error": type(error).__name__, "message": error.message, "request_id": error.request_id}


def parse(line: bytes) -> tuple[str, SamplingParams]:
    """A request. What its values may be is the target's to say."""
    try:
        request = json.loads(line)
        prompt = request.pop("prompt")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidRequestError("must be an object with a prompt", field="request") from None
    if not isinstance(prompt, str):
        raise InvalidRequestError("must be text", field="prompt")
    if unknown := request.keys() - FIELDS:
        raise InvalidRequestError(f"is not known; there are {', '.join(sorted(FIELDS))}", field=min(unknown))
    return prompt, SamplingParams(**request)


async def main() -> None:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1:8100")
    parser.add_argument("--target", default="127.0.0.1:50051")
    parser.add_argument("--draft", default="127.0.0.1:50052")
    options = parser.parse_args()

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    host, _, port = options.listen.rpartition(":")
    async with SpeculativeClient(options.target, options.draft) as client:
        server = await asyncio.start_server(functools.partial(converse, client), host, int(port))
        print("listening on {}:{}".format(*server.sockets[0].getsockname()), flush=True)
        await stop.wait()
        server.close()


if __name__ == "__main__":
    asyncio.run(main())
