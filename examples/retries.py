"""Deadlines, a full service, and what each kind of failure means to a caller.

    python examples/retries.py "import os" --within 20 --target 127.0.0.1:50051 --draft 127.0.0.1:50052

A lost draft or target is no failure: the client goes on by itself. What is left has a type of its own, and a service
that is full says when to come back.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from specpair import (
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    Result,
    SamplingParams,
    SpecpairError,
    SpeculativeClient,
    UnavailableError,
)


async def persist(client: SpeculativeClient, prompt: str, params: SamplingParams, within: float) -> Result:
    """A generation that comes back as it is told while the service is full, for `within` seconds in all."""
    deadline = time.monotonic() + within
    while True:
        try:
            return await client.generate(prompt, params, timeout=deadline - time.monotonic())
        except OverloadedError as refused:
            # By how long sessions have lasted lately and how many wait; infinite where coming back is of no use.
            wait = 1.0 if refused.retry_after is None else refused.retry_after
            if time.monotonic() + wait >= deadline:
                raise
            print(f"full ({refused.reason}): again in {wait:.1f} s", file=sys.stderr, flush=True)
            await asyncio.sleep(wait)


async def main() -> int:
    """Generates, and turns failures into exit codes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", nargs="?", default="import os\n")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--within", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--target", default="127.0.0.1:50051")
    parser.add_argument("--draft", default="127.0.0.1:50052")
    options = parser.parse_args()

    params = SamplingParams(max_new_tokens=options.max_new_tokens)
    async with SpeculativeClient(options.target, options.draft, resume_timeout=options.within) as client:
        try:
            result = await persist(client, options.prompt, params, options.within)
        except InvalidRequestError as error:  # the caller's own mistake: trying again is of no use
            print(f"wrong request: {error.field}: {error.message}", file=sys.stderr)
            return 2
        except OverloadedError as error:
            print(f"still full: {error.reason}", file=sys.stderr)
            return 3
        except UnavailableError as error:  # nobody there, for longer than `resume_timeout`
            print(f"unavailable: {error.message}", file=sys.stderr)
            return 3
        except DeadlineError as error:
            print(f"out of time: {error.message}", file=sys.stderr)
            return 4
        except SpecpairError as error:  # the service's log has more under this id
            print(f"failed: {error.message} (request {error.request_id or 'unknown'})", file=sys.stderr)
            return 1
    print(result.text)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
