"""Text from tokens: the same as decoding all of them at once, with nothing given out too early or too late."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.generation.stopping_criteria import StopStringCriteria

from specpair_target.text import TextStream

from ..tiny import TEXT, sentencepiece_tokenizer, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer()
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
EMOJI = TOKENIZER("😀")["input_ids"]
# Parts of the text, ids drawn blindly (halves of characters among them), special tokens.
IDS = st.one_of(
    st.text(alphabet=TEXT, max_size=40).map(lambda text: TOKENIZER(text)["input_ids"]),
    st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30),
)
STOPS = st.lists(
    st.one_of(
        st.tuples(st.integers(0, len(TEXT) - 1), st.integers(1, 6)).map(lambda cut: TEXT[cut[0] : cut[0] + cut[1]]),
        st.text(alphabet=TEXT, min_size=1, max_size=3),
    ).filter(bool),
    max_size=3,
)


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def visible(prompt, ids):
    """The text that ids add to a prompt, without half a character at the end."""
    return decode([*prompt, *ids])[len(decode(prompt)) :].rstrip(INCOMPLETE)


def test_the_tokenizer_splits_characters():
    """The tests below mean something: the emoji takes several tokens, and some tokens end in half a character."""
    assert len(EMOJI) > 1
    texts = [decode([id_]) for id_ in range(len(TOKENIZER))]
    assert any(text.endswith(INCOMPLETE) and text.strip(INCOMPLETE) for text in texts)


@given(prompt=st.text(alphabet=TEXT, max_size=12), ids=IDS)
def test_deltas_add_up_to_the_text(prompt, ids):
    """After every token all whole characters are out, and in the end everything is, as if decoded at once."""
    prompt = TOKENIZER(prompt)["input_ids"]
    stream, text = TextStream(TOKENIZER, prompt, ()), ""
    for count, id_ in enumerate(ids, start=1):
        text += stream.push(id_).released
        assert text == visible(prompt, ids[:count])
    assert text + stream.flush() == decode([*prompt, *ids])[len(decode(prompt)) :]


@given(prompt=IDS, ids=IDS, stops=STOPS)
@example(prompt=[], ids=TOKENIZER("naï")["input_ids"], stops=["na"])
@example(prompt=[], ids=TOKENIZER("stop stopped")["input_ids"], stops=["top s"])
@example(prompt=[], ids=TOKENIZER("the STOPPED")["input_ids"], stops=["TOPPED", "STOP"])
def test_a_stop_string_ends_the_text_before_it(prompt, ids, stops):
    """The token that completes a stop string in the text is the last; of several strings the one that begins first
    counts. Before that nothing is given out that may still become part of one, and nothing else is held back."""
    # A prompt that ends in half a character is the next test's.
    prompt = [] if decode(prompt).endswith(INCOMPLETE) else prompt
    stream, text = TextStream(TOKENIZER, prompt, stops), ""
    for count, id_ in enumerate(ids, start=1):
        update = stream.push(id_)
        text += update.released
        shown = visible(prompt, ids[:count])
        found = sorted((shown.find(stop), stop) for stop in stops if stop in shown)
        if found:
            assert (text, update.stop_string) == (shown[: found[0][0]], found[0][1])
            assert stream.flush() == ""
            return
        assert update.stop_string == ""
        held = max(
            (end for stop in stops for end in range(len(stop)) if end <= len(shown) and shown.endswith(stop[:end])),
            default=0,
        )
        assert text == shown[: len(shown) - held]
    # A string that was never completed is text like any other.
    assert text + stream.flush() == decode([*prompt, *ids])[len(decode(prompt)) :]


@given(text=st.text(alphabet="😀é( stop de", min_size=1, max_size=30), cut=st.integers(1, 30))
@example(text="a😀😀 b", cut=9)
@example(text="de😀😀😀 b", cut=9)
def test_deltas_of_a_tokenizer_that_falls_back_to_bytes(text, cut):
    """Spaces between words and characters of several tokens survive where the prompt ends between two words, or in
    the middle of a run of such characters."""
    ids = SENTENCEPIECE(text)["input_ids"]
    prompt = ids[: min(cut, len(ids))]
    before = SENTENCEPIECE.decode(prompt, skip_special_tokens=True)
    if INCOMPLETE in before:
        return
    stream = TextStream(SENTENCEPIECE, prompt, ())
    added = [stream.push(id_).released for id_ in ids[len(prompt) :]]
    assert before + "".join(added) + stream.flush() == SENTENCEPIECE.decode(ids, skip_special_tokens=True)


def test_a_prompt_may_end_in_half_a_character():
    """The tokens that complete it give out the whole character, as only they make it readable."""
    stream = TextStream(TOKENIZER, EMOJI[:1], ())
    updates = [stream.push(id_).released for id_ in [*EMOJI[1:], *TOKENIZER("x")["input_ids"]]]
    assert "".join(updates) == "😀x"


def test_only_the_end_of_a_long_prompt_is_read():
    """A prompt's length does not matter: its last tokens are context enough."""
    prompt = TOKENIZER(TEXT * 3)["input_ids"]
    stream = TextStream(TOKENIZER, prompt, ())
    assert "".join(stream.push(id_).released for id_ in prompt) == TEXT * 3


@given(ids=IDS, stop=STOPS.filter(bool))
def test_stops_at_the_same_token_as_transformers(ids, stop):
    """The criterion of `generate(stop_strings=...)` ends a sequence with the same token, or neither ends it. It reads
    the names of special tokens as text, which are none here."""
    ids = [id_ for id_ in ids if id_ not in TOKENIZER.all_special_ids]
    criterion = StopStringCriteria(TOKENIZER, stop)

    def ours():
        stream = TextStream(TOKENIZER, (), stop)
        return next((count for count, id_ in enumerate(ids, start=1) if stream.push(id_).stop_string), None)

    def theirs():
        for count in range(1, len(ids) + 1):
            if criterion(torch.tensor([ids[:count]]), None).item():
                return count
        return None

    assert ours() == theirs()
