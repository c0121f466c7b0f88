"""A plain script, without asyncio: a prompt in, the whole text out.

python examples/simple.py "def fibonacci(n):" --target 127.0.0.1:50051 --draft 127.0.0.1:50052
"""

from __future__ import annotations

import argparse
import sys

from specpair import SamplingParams, SyncSpeculativeClient


def main() -> None:
    """Generates once, and says how it went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", nargs="?", default="def fibonacci(n):\n")
    parser.add_argument("--target", default="127.0.0.1:50051")
    parser.add_argument("--draft", default="127.0.0.1:50052")
    options = parser.parse_args()

    with SyncSpeculativeClient(options.target, options.draft) as client:
        result = client.generate(options.prompt, SamplingParams(max_new_tokens=64))

    print(result.text)
    stats = result.stats
    print(
        f"{stats.output_tokens} tokens in {stats.rounds} rounds, {stats.accepted} of {stats.proposed} proposals taken",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
