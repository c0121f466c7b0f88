"""TLS, a client certificate, and bearer tokens, one for each service.

    python examples/secured.py "import os" --ca ca.pem --cert alice.pem --key alice-key.pem \\
        --token-file alice.token --draft-token-file alice-draft.token --target localhost:50051 --draft localhost:50052

docs/security.md says how to make the files. A draft that somebody else runs gets a token of its own: with the target's
it could ask the target itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from specpair import Credentials, SamplingParams, SyncSpeculativeClient, UnauthenticatedError


def main() -> int:
    """Generates once with credentials."""
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", nargs="?", default="import os\n")
    parser.add_argument("--ca", type=Path, help="CAs to trust in place of those that gRPC brings along")
    parser.add_argument("--cert", type=Path, help="certificate of this client, where the service asks for one")
    parser.add_argument("--key", type=Path, help="its private key")
    parser.add_argument("--token-file", type=Path, help="read again when it changes")
    parser.add_argument("--draft-token-file", type=Path)
    parser.add_argument("--target", default="localhost:50051")
    parser.add_argument("--draft", default="localhost:50052")
    options = parser.parse_args()

    mine = Credentials(ca=options.ca, cert=options.cert, key=options.key, token=options.token_file, tls=True)
    for_draft = dataclasses.replace(mine, token=options.draft_token_file)
    with SyncSpeculativeClient(options.target, options.draft, credentials=mine, draft_credentials=for_draft) as client:
        try:
            result = client.generate(options.prompt, SamplingParams(max_new_tokens=32))
        except UnauthenticatedError as error:  # the wrong CA, another host's name, no token or a wrong one
            print(f"not let in: {error.message}", file=sys.stderr)
            return 1
    print(result.text)
    for change in result.stats.proposer_changes:
        print(f"proposals came from {change.proposer}: {change.reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
