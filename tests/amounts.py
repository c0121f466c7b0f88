"""How much of something a test does: little by default, more where the environment asks for it."""

from __future__ import annotations

import os


def runs(default: int) -> int:
    """How many times a test does what it does at random: SPECPAIR_TEST_RUNS, or so many."""
    return _amount("SPECPAIR_TEST_RUNS", default)


def examples(default: int) -> int:
    """How many examples hypothesis tries: SPECPAIR_TEST_EXAMPLES, or so many."""
    return _amount("SPECPAIR_TEST_EXAMPLES", default)


def seconds(default: int) -> int:
    """For how long a test throws what it has: SPECPAIR_FUZZ_SECONDS, or so many."""
    return _amount("SPECPAIR_FUZZ_SECONDS", default)


def _amount(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
