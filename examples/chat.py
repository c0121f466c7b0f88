"""Several turns on one stream, one slot and one KV cache: what was said before is not computed again.

    python examples/chat.py --target 127.0.0.1:50051 --draft 127.0.0.1:50052

Each line of standard input is a turn. A target whose model has a chat template gets messages; to one without, as the
demo pair's, a turn is text that goes on behind the last answer.
"""

from __future__ import annotations

import argparse
import sys

from specpair import Prompt, SamplingParams, SyncSpeculativeClient


def main() -> None:
    """Answers until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="127.0.0.1:50051")
    parser.add_argument("--draft", default="127.0.0.1:50052")
    options = parser.parse_args()

    params = SamplingParams(max_new_tokens=48, temperature=0.7, seed=1)
    with SyncSpeculativeClient(options.target, options.draft) as client:
        target, _ = client.info()
        with client.session() as session:
            for line in sys.stdin:
                said = line.rstrip("\n")
                # A later turn is the new message alone: the target has the conversation so far.
                prompt: Prompt = [{"role": "user", "content": said}] if target.chat else f"\n{said}\n"
                result = session.generate(prompt, params)
                print(result.text, flush=True)
                stats = result.stats
                print(f"{stats.cached_tokens} of {stats.prompt_tokens} tokens were in the cache", file=sys.stderr)


if __name__ == "__main__":
    main()
