"""Laws of prompt lookup."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import specpair.ngram
from specpair.ngram import NgramIndex


def scan(token_ids: Sequence[int], max_tokens: int, min_ngram: int, max_ngram: int) -> list[int]:
    """The law, spelled out: the longest n-gram at the end, its last earlier occurrence, what followed it."""
    size = len(token_ids)
    for n in range(max_ngram, min_ngram - 1, -1):
        for end in range(size - 1, n - 1, -1):
            if n < size and list(token_ids[end - n : end]) == list(token_ids[size - n :]):
                log = list(token_ids)
                for i in range(max_tokens):
                    log.append(log[end + i])
                return log[size:]
    return []


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.integers(0, 12),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_finds_what_a_scan_finds(token_ids, max_tokens, min_ngram, more):
    """At every length of a growing text the index proposes what a search through the whole text finds."""
    index = NgramIndex(min_ngram=min_ngram, max_ngram=min_ngram + more)
    for i, token_id in enumerate(token_ids):
        index.append(token_id)
        assert index.lookup(max_tokens) == scan(token_ids[: i + 1], max_tokens, min_ngram, min_ngram + more)


def test_prefers_the_longer_match_and_the_later_one():
    """A longer n-gram beats a later shorter one; of equal ones the last occurrence counts."""
    assert NgramIndex([1, 2, 3, 7, 2, 3, 8, 1, 2, 3]).lookup(1) == [7]
    assert NgramIndex([2, 3, 7, 2, 3, 8, 2, 3]).lookup(1) == [8]


def test_continues_a_loop_for_as_long_as_asked():
    """A continuation that reaches the end of the text goes on in itself."""
    assert NgramIndex([5, 6, 5, 6]).lookup(7) == [5, 6, 5, 6, 5, 6, 5]


def test_nothing_to_find():
    """No proposal without a repetition, nor for an empty or a short text."""
    for token_ids in ([], [1], [1, 1], [1, 2, 3, 4, 5]):
        assert NgramIndex(token_ids, min_ngram=2).lookup(4) == []


def test_refuses_impossible_lengths():
    """1 <= min_ngram <= max_ngram."""
    for min_ngram, max_ngram in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match="must hold"):
            NgramIndex(min_ngram=min_ngram, max_ngram=max_ngram)


def test_appending_does_not_slow_down():
    """The cost of a token does not grow with the text before it."""
    index = NgramIndex(range(1000))

    def seconds(count: int) -> float:
        begin = time.process_time()
        for i in range(count):
            index.append(i)
            index.lookup(7)
        return time.process_time() - begin

    early = seconds(5000)
    index.extend(range(100_000))
    assert seconds(5000) < 10 * early + 0.1


def test_needs_the_standard_library_only():
    """The module can be run on its own, with nothing installed."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])"
    subprocess.run([sys.executable, "-I", "-S", "-c", code, specpair.ngram.__file__], check=True, timeout=60)
