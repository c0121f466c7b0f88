"""What came of everything that was asked, in constant memory: a leak must not hide behind the books."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from specpair import DeadlineError, OverloadedError, Result, SpecpairError, UnavailableError

# What a caller may have to see of services that are killed and networks that are cut.
_EXPECTED = (DeadlineError, OverloadedError, UnavailableError)
_MOST_EXAMPLES = 20
_LEAST, _PER_DECADE, _DECADES = 1e-4, 50, 7


class Latencies:
    """A histogram of seconds with buckets of 5 percent."""

    def __init__(self) -> None:
        self._counts = [0] * (_PER_DECADE * _DECADES)
        self.count = 0

    def add(self, seconds: float, times: int = 1) -> None:
        """So many tokens took so long each."""
        bucket = int(math.log10(max(seconds, _LEAST) / _LEAST) * _PER_DECADE)
        self._counts[min(bucket, len(self._counts) - 1)] += times
        self.count += times

    def quantile(self, share: float) -> float:
        """Seconds that this share of all stays below; NaN of none."""
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if count and seen >= share * self.count:
                return _LEAST * 10 ** ((bucket + 1) / _PER_DECADE)
        return math.nan

    def summary(self) -> dict[str, float]:
        """Milliseconds."""
        shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
        return {name: round(self.quantile(share) * 1000, 2) for name, share in shares.items()}


@dataclass
class Tally:
    """Counts of one group of clients."""

    per_token: Latencies = field(default_factory=Latencies)
    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    differing: list[str] = field(default_factory=list)
    untyped: list[str] = field(default_factory=list)

    def finished(self, result: Result) -> None:
        """A turn reached its end."""
        self.counts["finished"] += 1
        self.counts["tokens"] += len(result.token_ids)
        self.counts["resumes"] += result.stats.resumes
        self.counts["proposer_changes"] += len(result.stats.proposer_changes)

    def differs(self, what: str) -> None:
        """Tokens are not those of the reference."""
        self.counts["differing"] += 1
        _keep(self.differing, what)

    def failed(self, error: BaseException) -> None:
        """A turn ended with an exception."""
        reason = getattr(error, "reason", "")
        self.errors[f"{type(error).__name__} {reason}".rstrip()] += 1
        if not isinstance(error, SpecpairError):
            _keep(self.untyped, repr(error))
        elif not isinstance(error, _EXPECTED):
            _keep(self.untyped, f"unexpected: {error!r}")

    def faults(self) -> list[str]:
        """What must not be."""
        return [f"tokens differ: {what}" for what in self.differing] + [f"error: {what}" for what in self.untyped]

    def summary(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {**self.counts, "errors": dict(self.errors), "per_token_ms": self.per_token.summary()}


def _keep(examples: list[str], example: str) -> None:
    if len(examples) < _MOST_EXAMPLES:
        examples.append(example)
