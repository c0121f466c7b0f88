"""How turns end: at the right token, for the right reason, with nothing behind it."""

from __future__ import annotations

import pytest

from specpair.errors import InvalidRequestError
from specpair.v1.common_pb2 import FinishReason

from ..tiny import POSITIONS, VOCABULARY, random_ids, tiny_tokenizer
from .driving import PROPOSERS, Output, greedy, nobody, open_session, round_of, run, speak, together

STOP_TOKEN = FinishReason.FINISH_REASON_STOP_TOKEN
STOP_STRING = FinishReason.FINISH_REASON_STOP_STRING
MAX_NEW_TOKENS = FinishReason.FINISH_REASON_MAX_NEW_TOKENS
CACHE_FULL = FinishReason.FINISH_REASON_CACHE_FULL

WIDTH = 8
NEW = 3 * WIDTH
PROMPT = random_ids(11, seed=3)
TOKENIZER = tiny_tokenizer()
TEXT_PROMPT = TOKENIZER("def stop(x):")["input_ids"]


def with_every_proposer(engine, prompt, options, truth):
    """What a session says with each proposer; all of them must say the same, in texts as in tokens."""
    outputs = together(
        *(speak(engine, prompt, options, propose([*prompt, *truth])) for propose in (*PROPOSERS.values(), whole_blocks))
    )
    first = outputs[0]
    for output in outputs:
        assert output.token_ids == first.token_ids
        assert output.texts == first.texts
        assert (output.finish_reason, output.stop_string) == (first.finish_reason, first.stop_string)
    return first


def whole_blocks(truth):
    """A proposer whose blocks are all full and all true."""
    return lambda tokens, most: truth[len(tokens) : len(tokens) + most]


@pytest.fixture(scope="module")
def truth(tiny):
    """What the model says behind PROMPT, further than any test goes."""
    return tiny.reference("llama").greedy(PROMPT, NEW + WIDTH)


@pytest.fixture(scope="module")
def spoken(tiny):
    """What the model with a tokenizer says behind TEXT_PROMPT: ids, and their text."""
    reference = tiny.reference("llama-text")
    padding = list(range(len(TOKENIZER), reference.model.config.vocab_size))
    ids = reference.greedy(TEXT_PROMPT, NEW + WIDTH, suppress_tokens=padding)
    return ids, added_text(ids)


def added_text(ids):
    before = TOKENIZER.decode(TEXT_PROMPT, skip_special_tokens=True)
    return TOKENIZER.decode([*TEXT_PROMPT, *ids], skip_special_tokens=True)[len(before) :]


def test_an_end_of_sequence_inside_an_accepted_block(tiny, engine_of, truth):
    """Wherever the id that ends the turn stands, in a block or at its border, it is the last one, as for `generate`,
    although what was proposed behind it would have been accepted."""
    reference, engine = tiny.reference("llama"), engine_of("llama")
    firsts = [index for index, id_ in enumerate(truth[:NEW]) if id_ not in truth[:index]]
    assert {index % WIDTH for index in firsts} == set(range(WIDTH))
    for index in firsts:
        output = with_every_proposer(
            engine, PROMPT, greedy(NEW + WIDTH, stop_token_ids=frozenset({truth[index]})), truth
        )
        assert (
            output.token_ids == reference.greedy(PROMPT, NEW + WIDTH, eos_token_id=truth[index]) == truth[: index + 1]
        )
        assert output.finish_reason == STOP_TOKEN


def test_max_new_tokens_in_the_middle_of_a_block(engine_of, truth):
    """Exactly so many tokens, wherever in a block the last one stands."""
    for count in range(1, NEW):
        output = with_every_proposer(engine_of("llama"), PROMPT, greedy(count), truth)
        assert (output.token_ids, output.finish_reason) == (truth[:count], MAX_NEW_TOKENS)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "opt", "gpt2"])
def test_a_prompt_that_fills_the_cache(tiny, engine_of, family):
    """A prompt of as many tokens as the slot has positions, and the model knows, gets one token more, a shorter one as
    many more as it is shorter; then the cache is full."""
    engine = engine_of(family, max_length=POSITIONS)
    for missing in (0, 1, 2, WIDTH - 1, WIDTH, WIDTH + 1):
        prompt = random_ids(POSITIONS - missing)
        truth = tiny.reference(family).greedy(prompt, missing + 1)
        output = with_every_proposer(engine, prompt, greedy(), [*truth, *random_ids(WIDTH)])
        assert (output.token_ids, output.finish_reason) == (truth, CACHE_FULL)


def test_a_slot_may_be_shorter_than_any_block(engine_of, tiny):
    """A cache of two positions: a prompt of one token gets two, a prompt of two gets one."""
    engine = engine_of("llama", max_length=2)
    for prompt in (PROMPT[:1], PROMPT[:2]):
        truth = tiny.reference("llama").greedy(prompt, 3 - len(prompt))
        output = with_every_proposer(engine, prompt, greedy(), [*truth, *random_ids(WIDTH)])
        assert (output.token_ids, output.finish_reason) == (truth, CACHE_FULL)


def test_a_stop_string_wherever_it_stands(tiny, engine_of, spoken):
    """A stop string inside a token, over several tokens and over two blocks ends the turn with the token that
    completes it, as for `generate(stop_strings=...)`; the text ends before it."""
    ids, text = spoken
    reference, engine = tiny.reference("llama-text"), engine_of("llama-text")
    padding = list(range(len(TOKENIZER), reference.model.config.vocab_size))
    before = TOKENIZER.decode(TEXT_PROMPT)
    stops = [text[start : start + length] for start in range(0, len(text), 4) for length in (1, 2, 3, 7)]
    lengths = set()
    for stop in dict.fromkeys(stops):
        # `generate` also looks for what begins in the prompt, and neither can find half a character.
        whole = before + text
        if "\N{REPLACEMENT CHARACTER}" in stop or whole.find(stop, len(before) - len(stop) + 1) < len(before):
            continue
        expected = reference.greedy(
            TEXT_PROMPT, NEW + WIDTH, stop_strings=[stop], tokenizer=TOKENIZER, suppress_tokens=padding
        )
        output = with_every_proposer(engine, TEXT_PROMPT, greedy(NEW + WIDTH, stop_strings=(stop,)), ids)
        assert output.token_ids == expected
        assert (output.finish_reason, output.stop_string) == (STOP_STRING, stop)
        assert output.text == text[: text.find(stop)]
        lengths.add(len(expected))
    assert len(lengths) > WIDTH


def test_a_stop_string_that_never_comes(engine_of, spoken):
    """What could have become a stop string is text after all: the end of the turn releases it."""
    ids, _ = spoken
    for held in (1, 3, 8):
        stop = added_text(ids[:NEW])[-held:] + "\N{SNOWMAN}"
        output = with_every_proposer(engine_of("llama-text"), TEXT_PROMPT, greedy(NEW, stop_strings=(stop,)), ids)
        assert (output.token_ids, output.finish_reason, output.stop_string) == (ids[:NEW], MAX_NEW_TOKENS, "")
        assert output.text == added_text(ids[:NEW])


def test_the_text_is_that_of_all_tokens(engine_of, spoken):
    """However the tokens come in blocks, and wherever a session is resumed, each token adds the same text."""
    ids, _ = spoken
    engine = engine_of("llama-text")
    output = with_every_proposer(engine, TEXT_PROMPT, greedy(NEW), ids)
    assert output.text == added_text(ids[:NEW])
    for cut in range(NEW):
        resumed = run(speak(engine, TEXT_PROMPT, greedy(NEW), PROPOSERS["half"]([*TEXT_PROMPT, *ids]), ids[:cut]))
        assert resumed.texts == output.texts[cut:]


def test_the_stronger_reason_wins(engine_of, spoken):
    """A token that ends the turn in several ways at once: a stop token goes before a stop string, a stop string before
    the number of tokens, and that before the end of the cache."""
    ids, _ = spoken
    engine = engine_of("llama-text", max_length=len(TEXT_PROMPT) + NEW)
    count = next(
        n for n in range(WIDTH + 2, NEW) if ids[n - 1] not in ids[: n - 1] and TOKENIZER.decode([ids[n - 1]]).isascii()
    )
    token, string = frozenset({ids[count - 1]}), (added_text(ids[:count])[-2:],)
    assert string[0] not in added_text(ids[: count - 1])
    cases = {
        STOP_TOKEN: greedy(count, stop_token_ids=token, stop_strings=string),
        STOP_STRING: greedy(count, stop_strings=string),
        MAX_NEW_TOKENS: greedy(count),
    }
    for reason, options in cases.items():
        output = with_every_proposer(engine, TEXT_PROMPT, options, ids)
        assert (output.token_ids, output.finish_reason) == (ids[:count], reason)
    # The last position is taken by the token before; this one needs none.
    for reason, options in ((MAX_NEW_TOKENS, greedy(NEW + 1)), (CACHE_FULL, greedy(NEW + 2)), (CACHE_FULL, greedy())):
        output = with_every_proposer(engine, TEXT_PROMPT, options, ids)
        assert (output.token_ids, output.finish_reason) == (ids[: NEW + 1], reason)


def test_committed_tokens_that_already_end_the_turn(engine_of, truth):
    """They are refused by name, whatever the reason, and cost no slot."""
    engine = engine_of("llama")
    cases = [
        (truth[:5], greedy(5)),
        (truth[:5], greedy(3)),
        (truth[:5], greedy(stop_token_ids=frozenset({truth[4]}))),
        (random_ids(engine.max_length + 1), greedy()),
    ]

    async def refused(committed, options):
        with pytest.raises(InvalidRequestError) as error:
            await open_session(engine, PROMPT, options, committed)
        return error.value.field

    assert together(*(refused(*case) for case in cases)) == ["committed"] * len(cases)
    assert engine.pool.in_use == 0


def test_padding_of_the_vocabulary_is_never_chosen(engine_of, tiny):
    """Ids behind the tokenizer's last one have logits in the model and no chance, greedy or sampled."""
    reference = tiny.reference("llama-text")
    rows, size = reference.model.config.vocab_size, len(TOKENIZER)
    assert rows > size == engine_of("llama-text").model.loaded.fingerprint.vocabulary_size
    prompts = [random_ids(length, vocabulary=size) for length in range(1, 30)]
    assert any(int(reference.logits(prompt).argmax()) >= size for prompt in prompts)
    outputs = together(*(speak(engine_of("llama-text"), prompt, greedy(8)) for prompt in prompts))
    assert all(id_ < size for output in outputs for id_ in output.token_ids)


def test_without_a_tokenizer_there_is_no_text(engine_of):
    """A model with no tokenizer beside it speaks all ids of its matrix, in ids alone."""
    engine = engine_of("gemma")
    assert engine.model.loaded.tokenizer is None
    assert engine.model.loaded.fingerprint.vocabulary_size == VOCABULARY
    output = run(speak(engine, PROMPT, greedy(5), nobody))
    assert output.texts == [""] * 5


def test_a_session_goes_on_while_nothing_ends_it(engine_of, truth):
    """Until its end a turn has no reason to end, and each round gives one token at least."""
    engine = engine_of("llama")

    async def rounds():
        session = await open_session(engine, PROMPT, greedy(NEW))
        output = Output()
        try:
            while not output.finish_reason:
                known = len(output.token_ids)
                await round_of(engine, session, (), output)
                assert len(output.token_ids) == known + 1
        finally:
            engine.close(session)
        return output

    output = run(rounds())
    assert (output.token_ids, output.rounds) == (truth[:NEW], NEW)
