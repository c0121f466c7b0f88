"""Text as it is committed, who proposed each token, and an end that the caller decides.

    python examples/streaming.py "class Stack:" --lines 5 --target 127.0.0.1:50051 --draft 127.0.0.1:50052

Leaving the stream's block before its end frees both services' slots at once.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter

from specpair import SamplingParams, Source, SpeculativeClient


async def main() -> None:
    """Prints at most so many lines of what is generated."""
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", nargs="?", default="class Stack:\n")
    parser.add_argument("--lines", type=int, default=5)
    parser.add_argument("--target", default="127.0.0.1:50051")
    parser.add_argument("--draft", default="127.0.0.1:50052")
    options = parser.parse_args()

    params = SamplingParams(max_new_tokens=200, temperature=0.7, seed=1)
    sources: Counter[Source] = Counter()
    text = ""
    async with (
        SpeculativeClient(options.target, options.draft) as client,
        client.stream(options.prompt, params) as stream,
    ):
        async for chunk in stream:
            text += chunk.text
            sources.update(token.source for token in chunk.tokens)
            print(chunk.text, end="", flush=True)
            if text.count("\n") >= options.lines:
                break
    print()
    print(", ".join(f"{source}: {count} tokens" for source, count in sources.most_common()), file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main())
