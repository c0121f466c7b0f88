"""What the metrics cost: microseconds of a round, a step and a scrape, the best of many runs.

.venv/bin/python bench/metrics_cost.py
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

from prometheus_client import CollectorRegistry, generate_latest

from specpair.v1 import common_pb2
from specpair_draft.metrics import DraftMetrics
from specpair_target.blocks import Verification
from specpair_target.metrics import StreamMetrics, VerifyMetrics
from specpair_target.sessions import Commit
from specpair_target.verifier import Judgement

_TIMES, _RUNS = 20_000, 15


def main() -> None:
    """Prints one line for each."""
    registry = CollectorRegistry()
    target, draft = VerifyMetrics(registry), DraftMetrics()
    stream = StreamMetrics(target)
    judgement = Judgement(4, [1, 2, 3, 4, 5], True, 2400, 300, [])
    commit = Commit([1, 2, 3, 4, 5], [""] * 5, [], common_pb2.FINISH_REASON_UNSPECIFIED, "")
    answer = Verification(judgement, commit, 100, 120, 1)

    def round_() -> None:
        stream.submitted(1)
        stream.answered(common_pb2.SOURCE_MODEL, 7, 4, answer)

    _show("target, a round of a session (event loop)", round_)
    _show("target, a step of all sessions (engine thread)", lambda: target.engine.stepped(4, 0.0024))
    _show("target, a chunk of a prompt (engine thread)", lambda: target.engine.prefilled(128, 0.01))
    _show("draft, a proposal (event loop)", lambda: draft.proposed(common_pb2.SOURCE_MODEL, 7, 120, 900))
    _show("draft, a run of steps (engine thread)", lambda: draft.engine.stepped(4, 0.0009))
    for proposed in range(64):
        for accepted in range(proposed + 1):
            stream.answered(common_pb2.SOURCE_NGRAM, proposed, accepted, answer)
    _show("target, a scrape after every possible outcome", lambda: generate_latest(registry), times=20)


def _show(name: str, work: Callable[[], object], times: int = _TIMES) -> None:
    best = min(timeit.repeat(work, number=times, repeat=_RUNS)) / times
    print(f"{name:50} {best * 1e6:9.2f} us")


if __name__ == "__main__":
    main()
