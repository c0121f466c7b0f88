"""Laws of prompt lookup."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import specpair.ngram
from specpair.ngram import NgramIndex

texts = st.lists(st.integers(0, 3), max_size=60)


def matching(text: Sequence[int], end: int, log: Sequence[int]) -> int:
    """Tokens before `end` that are those at the end of the log."""
    length = 0
    while length < min(end, len(log)) and text[end - 1 - length] == log[-1 - length]:
        length += 1
    return length


def scan(token_ids: Sequence[int], max_tokens: int, min_ngram: int) -> tuple[list[int], int]:
    """The law, spelled out: the longest match of the end, its last earlier occurrence, what followed it."""
    log = list(token_ids)
    lengths = [(matching(log, end, log), end) for end in range(1, len(log))]
    best, end = max(lengths, default=(0, 0))
    if best < min_ngram:
        return [], 0
    for i in range(max_tokens):
        log.append(log[end + i])
    return log[len(token_ids) :], best


@given(texts, st.integers(0, 12), st.integers(1, 4), st.sets(st.integers(0, 59)))
def test_finds_what_a_scan_finds(token_ids, max_tokens, min_ngram, silent):
    """At every length of a growing text the index finds what a search through the whole text finds, however long the
    match is, and whether or not it was asked at the lengths before."""
    index = NgramIndex(min_ngram=min_ngram)
    for i, token_id in enumerate(token_ids):
        index.append(token_id)
        if i in silent:
            continue
        found = index.find(max_tokens)
        assert (list(found.token_ids), found.length) == scan(token_ids[: i + 1], max_tokens, min_ngram)
        assert index.lookup(max_tokens) == list(found.token_ids)


@given(texts, st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 12))
def test_an_assumed_tail(token_ids, tail, max_tokens):
    """What is found behind a tail stands in text and tail behind as much as the match says, and no longer match stands
    in the text; the index stays as it was."""
    index, twin = NgramIndex(token_ids), NgramIndex(token_ids)
    for asked in range(1, len(tail) + 1):
        log = [*token_ids, *tail[:asked]]
        found = index.find(max_tokens, tail[:asked])
        assert found.length >= max(
            (n for end in range(len(token_ids)) if (n := matching(log, end, log)) >= 2), default=0
        )
        if found.length:
            continuations = []
            for end in range(found.length, len(log)):
                if matching(log, end, log) >= found.length:
                    grown = list(log)
                    for i in range(max_tokens):
                        grown.append(grown[end + i])
                    continuations.append(tuple(grown[len(log) :]))
            assert found.token_ids in continuations
    assert index.find(max_tokens) == twin.find(max_tokens)
    assert len(index) == len(token_ids)


@given(texts, st.lists(st.integers(0, 3), max_size=20), st.integers(1, 8), st.integers(0, 60))
def test_finds_the_end_of_another_text(token_ids, other, max_tokens, near):
    """The longest match of another text's end: the latest of them with the most tokens behind it, or the nearest to a
    place; the continuation ends with the text."""
    ends = [(matching(token_ids, end, other), end) for end in range(1, len(token_ids))]
    longest = max((n for n, _ in ends if n >= 2), default=0)
    best = [end for n, end in ends if n == longest >= 2]
    index = NgramIndex(token_ids)
    found = index.find_behind(other, max_tokens)
    assert found.length == longest
    place, length = index.search(other, near=near)
    assert length == longest
    if best:
        chosen = max(best, key=lambda end: (min(len(token_ids) - end, max_tokens), end))
        assert list(found.token_ids) == token_ids[chosen : chosen + max_tokens]
        assert abs(place - near) == min(abs(end - near) for end in best)


@given(st.lists(texts, min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=20), st.integers(1, 8))
def test_texts_are_apart(parts, other, max_tokens):
    """Neither a match nor a continuation crosses the border between two texts in one index."""
    index = NgramIndex()
    for part in parts:
        index.cut()
        index.extend(part)
    found = index.find_behind(other, max_tokens)
    alone = [NgramIndex(part).find_behind(other, max_tokens) for part in parts]
    assert found.length == max(match.length for match in alone)
    assert not found.length or found in alone


def test_prefers_the_longer_match_and_the_later_one():
    """A longer match beats a later shorter one; of equal ones the last occurrence counts."""
    assert NgramIndex([1, 2, 3, 7, 2, 3, 8, 1, 2, 3]).lookup(1) == [7]
    assert NgramIndex([2, 3, 7, 2, 3, 8, 2, 3]).lookup(1) == [8]


def test_continues_a_loop_for_as_long_as_asked():
    """A continuation that reaches the end of the text goes on in itself."""
    assert NgramIndex([5, 6, 5, 6]).lookup(7) == [5, 6, 5, 6, 5, 6, 5]
    assert NgramIndex([5, 6, 5, 6]).lookup(3, [5]) == [6, 5, 6]


def test_nothing_to_find():
    """No proposal without a repetition, nor for an empty or a short text."""
    for token_ids in ([], [1], [1, 1], [1, 2, 3, 4, 5]):
        assert NgramIndex(token_ids, min_ngram=2).lookup(4) == []
        assert NgramIndex(token_ids).find_behind([], 4).length == 0


def test_refuses_impossible_lengths():
    """A match has a token at least, and a search looks at a place at least."""
    for wrong in ({"min_ngram": 0}, {"most_places": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            NgramIndex(**wrong)


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


class Counted(list):
    """A text that counts how often it is read."""

    reads = 0

    def __getitem__(self, at):
        self.reads += 1
        return super().__getitem__(at)


def test_a_search_looks_at_so_many_places_only():
    """A pair that stands everywhere does not make a search walk through all of the text: it is sound, and bounded."""
    index = NgramIndex([1, 2] + [7] * 20_000, most_places=50)
    other = Counted([1, 7, 7])
    found = index.find_behind(other, 3)
    assert found.length == 2
    assert other.reads < 200


def test_memory():
    """A token of a text that repeats itself, as texts do, takes less than 64 bytes."""
    ids = [i * i % 1009 for i in range(50_000)]
    tracemalloc.start()
    try:
        index = NgramIndex(ids)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 64 * len(index)


def test_needs_the_standard_library_only():
    """The module can be run on its own, with nothing installed."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])"
    subprocess.run([sys.executable, "-I", "-S", "-c", code, specpair.ngram.__file__], check=True, timeout=60)
