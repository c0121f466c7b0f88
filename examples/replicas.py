"""Two targets, one of which may go away at any time: a generation under way goes on at the other, with the same tokens.

    python examples/replicas.py --target 127.0.0.1:50051,127.0.0.1:50061 --draft 127.0.0.1:50052

Stop one of the targets while it runs, by SIGTERM or SIGKILL. Both have to run the same model in the same format.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

from specpair import SamplingParams, SpeculativeClient


async def main() -> None:
    """Generates a long text, and says how often its target was lost."""
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", nargs="?", default="import os\n")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--target", default="127.0.0.1:50051,127.0.0.1:50061")
    parser.add_argument("--draft", default="127.0.0.1:50052")
    options = parser.parse_args()
    logging.basicConfig(format="%(name)s: %(message)s")  # the client's warnings say what it met

    params = SamplingParams(max_new_tokens=options.max_new_tokens, temperature=0.7, seed=1, ignore_eos=True)
    # Whoever is alone waits so many seconds for its target to be back before the loss becomes an error.
    async with SpeculativeClient(options.target, options.draft, resume_timeout=60.0) as client:
        stream = client.stream(options.prompt, params)
        async for chunk in stream:
            print(chunk.text, end="", flush=True)
    print()
    print(f"{stream.stats.output_tokens} tokens, target lost {stream.stats.resumes} times", file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main())
