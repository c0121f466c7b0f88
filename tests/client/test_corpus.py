"""Laws of a corpus: what it finds, what it forgets, what it lets through between texts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpair import Corpus, InvalidRequestError
from specpair.ngram import NgramIndex

texts = st.lists(st.integers(0, 3), max_size=12)


@given(st.lists(texts, max_size=6), texts, st.integers(1, 8))
def test_finds_the_longest_match_in_any_text(given_texts, log, most):
    """Of all texts the one with the longest match of the log's end answers, and only with its own tokens."""
    corpus = Corpus(given_texts)
    found = corpus.find(log, most)
    alone = [NgramIndex(text).find_behind(log, most) for text in given_texts]
    assert found.length == max((match.length for match in alone), default=0)
    assert not found.length or found in alone


def test_the_later_of_two_equal_texts_counts():
    """What was added last is found, also when more has been added since."""
    corpus = Corpus([[1, 2, 3], [1, 2, 4], [5, 6, 7]])
    assert corpus.find([9, 1, 2], 5).token_ids == (4,)


@given(st.lists(texts, max_size=30), st.integers(4, 40))
def test_memory_is_bounded_and_the_latest_texts_stay(given_texts, most):
    """Never more tokens than allowed; what was added within the last half of them is found."""
    corpus = Corpus(max_tokens=most)
    for text in given_texts:
        corpus.add(text)
        assert len(corpus) <= most
    left = most // 2
    for text in reversed(given_texts):
        left -= len(text) + 1
        if left < 0:
            break
        for end in range(2, len(text)):
            assert corpus.find(text[:end], 1).length >= end


def test_the_oldest_go():
    """A corpus that has taken in as much again as it holds knows nothing of what came before."""
    corpus = Corpus([[1, 2, 3]], max_tokens=20)
    assert corpus.find([1, 2], 1).token_ids == (3,)
    for i in range(5):
        corpus.add([10 + 2 * i, 11 + 2 * i, 9])
    assert corpus.find([1, 2], 1).length == 0


def test_of_a_text_that_is_too_long_the_end_is_kept():
    """One output cannot be more than half of the corpus."""
    corpus = Corpus([list(range(100))], max_tokens=40)
    assert corpus.find([97, 98], 3).token_ids == (99,)
    assert corpus.find([10, 11], 3).length == 0


def test_threads_share_a_corpus():
    """Texts that threads add while others look them up are whole."""
    corpus = Corpus(max_tokens=4000)

    def work(seed):
        for i in range(60):
            corpus.add([seed, 1000 + i, 2000 + i, seed])
            found = corpus.find([seed, 1000 + i], 3)
            assert found.token_ids == (2000 + i, seed)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result()


def test_refuses_a_corpus_of_nothing():
    """A corpus holds something."""
    with pytest.raises(InvalidRequestError) as refused:
        Corpus(max_tokens=3)
    assert refused.value.field == "max_tokens"
