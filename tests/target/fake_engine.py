"""A scheduler on a model that computes nothing and writes down what it is asked to compute."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from specpair_target.scheduler import Scheduler
from specpair_target.sessions import Session, TurnOptions
from specpair_target.verifier import Judgement

WIDTH = 8
CHUNK = 32
BORDER = 256


@dataclass
class FakeRunner:
    """Attended lengths of 256 and 512 positions, slots without buckets."""

    events: list
    parking: int = 512

    def bucket(self, start, rows=1):
        return BORDER if start + rows <= BORDER else 2 * BORDER

    def slot_range(self, slots):
        return range(min(slots), max(slots) + 1)

    def prefill(self, slot, token_ids, start):
        self.events.append(("chunk", slot))


@dataclass
class FakeVerifier:
    """Says the position of each token: behind n tokens comes id n. Accepts what agrees with that.

    Every step first takes a turn at the `gate`, if there is one.
    """

    events: list = field(default_factory=list)
    width: int = WIDTH
    gate: threading.Semaphore | None = None
    reached: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self.runner = FakeRunner(self.events)

    def verify(self, first_slot, rows, length):
        self.reached.set()
        if self.gate is not None:
            assert self.gate.acquire(timeout=30)
        in_use = [first_slot + place for place, row in enumerate(rows) if row.start != self.runner.parking]
        self.events.append(("step", *in_use))
        return [self._judge(row) for row in rows]

    def _judge(self, row):
        proposals = row.token_ids[1:]
        own = range(row.start + 1, row.start + 2 + len(proposals))
        accepted = next((n for n, id_ in enumerate(proposals) if id_ != own[n]), len(proposals))
        return Judgement(accepted, list(own[: accepted + 1]), finite=True, forward_us=1, judge_us=0, logprobs=[])


def fake_session(slot, length, *, prefilled=False, **options):
    """A session whose prompt is 0, 1, 2, ..., in the cache already or not."""
    return Session(
        id=str(slot),
        tokens=list(range(length)),
        prompt_length=length,
        max_length=512,
        options=TurnOptions(**options),
        text=None,
        slot=slot,
        kv_length=length - 1 if prefilled else 0,
    )


def fake_scheduler(verifier, **options):
    """A scheduler that has not started."""
    return Scheduler(verifier, prefill_chunk=CHUNK, **options)
