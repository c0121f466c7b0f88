"""Every decoding option, one by one and mixed: the output is `generate`'s, and no proposal changes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specpair.v1.common_pb2 import FinishReason
from specpair_runtime.sampling.params import SamplingParams
from specpair_target.sessions import TurnOptions

from ..sampling.penalties import PresenceAndFrequency, penalties, truncations
from ..tiny import VOCABULARY, random_ids, tiny_tokenizer
from .driving import PROPOSERS, nobody, run, speak, together
from .guessing import Guesser, best_of, most_probable, told

NEW = 18
PROMPTS = [random_ids(length, seed=7) for length in (1, 6, 33, 50)]
TOKENIZER = tiny_tokenizer()


# --- greedy, against `generate` ------------------------------------------------------------------------------------


def turn(params, **options):
    return TurnOptions(sampling=params, **{"max_new_tokens": NEW, **options})


def as_generate(turn_options, prompt):
    """The options of `generate` for a greedy turn; presence and frequency penalties are not among its own."""
    params = turn_options.sampling
    options = {"repetition_penalty": params.repetition_penalty, "min_new_tokens": params.min_new_tokens}
    if params.logit_bias:
        options["sequence_bias"] = {(token_id,): bias for token_id, bias in params.logit_bias}
    if params.presence_penalty or params.frequency_penalty:
        options["logits_processor"] = [PresenceAndFrequency(params, len(prompt))]
    if turn_options.stop_token_ids:
        options |= {"eos_token_id": sorted(turn_options.stop_token_ids), "pad_token_id": 0}
    if turn_options.stop_strings:
        options |= {"stop_strings": list(turn_options.stop_strings), "tokenizer": TOKENIZER}
    return options


def with_every_proposer(engine, prompt, turn_options, truth):
    """What a session says with each proposer, side by side."""
    return together(
        *(speak(engine, prompt, turn_options, propose([*prompt, *truth])) for propose in PROPOSERS.values())
    )


PENALTIES = {
    "repetition": SamplingParams(repetition_penalty=1.4),
    "encouraged repetition": SamplingParams(repetition_penalty=0.6),
    "presence": SamplingParams(presence_penalty=2.0),
    "frequency": SamplingParams(frequency_penalty=2.0),
    "encouraged": SamplingParams(presence_penalty=-1.0, frequency_penalty=-0.7),
    "bias": SamplingParams(logit_bias=tuple((token_id, 9.0) for token_id in range(3, VOCABULARY, 17))),
    "ban": SamplingParams(logit_bias=tuple((token_id, -1000.0) for token_id in range(0, VOCABULARY, 2))),
    "all": SamplingParams(
        repetition_penalty=1.2, presence_penalty=0.8, frequency_penalty=0.5, logit_bias=((5, 4.0), (9, -1000.0))
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_and_bias_equal_generate(tiny, engine_of, name):
    """Greedy with a penalty or a bias says, token by token, what `generate` says with it, whoever proposes; it is
    not what the model says without."""
    reference, engine = tiny.reference("llama"), engine_of("llama")
    changed = 0
    for prompt in PROMPTS:
        turn_options = turn(PENALTIES[name])
        expected = reference.greedy(prompt, NEW, **as_generate(turn_options, prompt))
        changed += expected != reference.greedy(prompt, NEW)
        outputs = with_every_proposer(engine, prompt, turn_options, expected)
        assert [output.token_ids for output in outputs] == [expected] * len(PROPOSERS)
        assert outputs[list(PROPOSERS).index("oracle")].accepted > 0
    assert changed > 0


@pytest.mark.parametrize("least", [0, 1, 4, 7, 8, 9, NEW])
def test_stop_ids_and_minimum_length_equal_generate(tiny, engine_of, least):
    """Ids that end the turn are not chosen before the minimum length and end it afterwards, as for `generate`, whoever
    proposes, wherever in a block they come."""
    reference, engine = tiny.reference("llama"), engine_of("llama")
    lengths = set()
    for prompt in PROMPTS:
        plain = reference.greedy(prompt, NEW)
        for stops in (plain[2:3], plain[3:9:5], [*plain[:1], plain[9]]):
            turn_options = turn(SamplingParams(min_new_tokens=least), stop_token_ids=frozenset(stops))
            expected = reference.greedy(prompt, NEW, **as_generate(turn_options, prompt))
            outputs = with_every_proposer(engine, prompt, turn_options, [*expected, *plain])
            assert [output.token_ids for output in outputs] == [expected] * len(PROPOSERS)
            lengths.add(len(expected))
    assert min(lengths) >= min(least, NEW)
    assert least == NEW or min(lengths) < NEW


def test_stop_strings_equal_generate(tiny, engine_of):
    """Stop strings end the turn with the token that completes them, as for `generate`, among penalties that change
    what is said, and also before the minimum length, which holds back ids alone."""
    reference, engine = tiny.reference("llama-text"), engine_of("llama-text")
    prompt = TOKENIZER("def stop(x):")["input_ids"]
    padding = list(range(len(TOKENIZER), reference.model.config.vocab_size))
    for params in (SamplingParams(), SamplingParams(presence_penalty=1.5, repetition_penalty=1.2, min_new_tokens=10)):
        options = as_generate(turn(params), prompt)
        free = reference.greedy(prompt, NEW, suppress_tokens=padding, **options)
        text = TOKENIZER.decode([*prompt, *free])[len(TOKENIZER.decode(prompt)) :]
        # Half characters have no place in a stop string.
        stops = [text[start : start + 3] for start in range(len(text) - 2)]
        lengths = set()
        for stop in [stop for stop in stops if stop.isascii()][:8]:
            turn_options = turn(params, stop_strings=(stop, "never said"))
            expected = reference.greedy(prompt, NEW, suppress_tokens=padding, **as_generate(turn_options, prompt))
            outputs = with_every_proposer(engine, prompt, turn_options, free)
            assert [output.token_ids for output in outputs] == [expected] * len(PROPOSERS)
            assert {output.finish_reason for output in outputs} == {FinishReason.FINISH_REASON_STOP_STRING}
            lengths.add(len(expected))
        assert min(lengths) < 10
        assert len(lengths) > 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    given_params=penalties(VOCABULARY),
    length=st.integers(1, 40),
    stops=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=20),
)
def test_random_penalties_equal_generate(tiny, engine_of, given_params, length, stops):
    """Any mixture of greedy options says what `generate` says with it, whoever proposes."""
    prompt = random_ids(length, seed=8)
    turn_options = turn(SamplingParams(**given_params), stop_token_ids=stops)
    expected = tiny.reference("llama").greedy(prompt, NEW, **as_generate(turn_options, prompt))
    outputs = with_every_proposer(engine_of("llama"), prompt, turn_options, expected)
    assert [output.token_ids for output in outputs] == [expected] * len(PROPOSERS)


# --- everything together, against the same without proposals -------------------------------------------------------


seeds = st.integers(-(2**63), 2**63 - 1)


@st.composite
def turns(draw):
    """Options of a turn, all of them drawn; how long its prompt is; and where it breaks off to be resumed."""
    params = SamplingParams(
        seed=draw(seeds), rejection=draw(st.booleans()), **draw(penalties(VOCABULARY)), **draw(truncations())
    )
    options = turn(
        params,
        max_new_tokens=draw(st.integers(1, 14)),
        stop_token_ids=draw(st.frozensets(st.integers(0, VOCABULARY - 1), max_size=8)),
        stop_strings=tuple(draw(st.lists(st.sampled_from(["e", "st", "\n", " = ", "pp"]), max_size=2))),
        top_logprobs=draw(st.sampled_from([None, 0, 3])),
    )
    return options, random_ids(draw(st.integers(1, 36)), seed=9), draw(st.sampled_from([0, 0, 1, 5, 9]))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sessions=st.lists(turns(), min_size=2, max_size=4), seed=st.integers(0, 2**31))
def test_no_proposal_changes_any_mixture_of_options(engine_of, sessions, seed):
    """Sessions with any options, side by side in one batch, resumed or not, with proposals of any length and quality,
    say what each says alone and without proposals. Under the rejection rule so do those whose distribution leaves no
    choice; the others end as their options say."""
    engine = engine_of("llama-text")
    alone = [run(told(engine, prompt, replace(options, top_logprobs=3))) for options, prompt, _ in sessions]
    asked = []
    for number, ((options, prompt, cut), own) in enumerate(zip(sessions, alone, strict=True)):
        truth, rejection = [*prompt, *own.token_ids], options.sampling.rejection
        guesser = Guesser(truth, seed + number, rejection, most_probable(prompt, own))
        asked.append((prompt, options, guesser, own.token_ids[: min(cut, len(own.token_ids) - 1)]))
    beside = together(*(told(engine, *session) for session in asked))
    for (_, options, _, committed), own, heard in zip(asked, alone, beside, strict=True):
        params = options.sampling
        said = [*committed, *heard.token_ids]
        if not params.rejection or params.greedy or params.top_k == 1:
            assert said == own.token_ids
            assert heard.finish_reason == own.finish_reason
        assert len(heard.logprobs) == (0 if options.top_logprobs is None else len(heard.token_ids))
        ends = [id_ in options.stop_token_ids for id_ in said]
        assert not any(ends[:-1])
        assert not ends[-1] or len(said) > params.min_new_tokens
        if heard.finish_reason == FinishReason.FINISH_REASON_STOP_TOKEN:
            assert ends[-1]
        if heard.finish_reason == FinishReason.FINISH_REASON_MAX_NEW_TOKENS:
            assert len(said) == options.max_new_tokens


def test_the_rules_agree_where_nobody_proposes(engine_of):
    """Without proposals the rejection rule draws the target's own tokens, which are those of the coupled rule."""
    engine = engine_of("llama")
    for prompt in PROMPTS:
        params = SamplingParams(temperature=1.0, top_p=0.9, seed=11)
        coupled, ratio = (
            run(speak(engine, prompt, turn(replace(params, rejection=rejection)), nobody))
            for rejection in (False, True)
        )
        assert coupled.token_ids == ratio.token_ids


def test_greedy_is_the_same_under_both_rules(tiny, engine_of):
    """At temperature 0 the rejection rule is greedy decoding, whatever probabilities come with the proposals, also
    beside sessions that are sampled."""
    reference, engine = tiny.reference("llama"), engine_of("llama")
    expected = [reference.greedy(prompt, NEW) for prompt in PROMPTS]
    greedy_turn = turn(SamplingParams(rejection=True, top_k=3, top_p=0.5, seed=5))
    sampled_turn = turn(SamplingParams(temperature=1.3, rejection=True, seed=6))
    heard = together(
        *(
            told(engine, prompt, options, Guesser([*prompt, *ids], seed=n, rejection=True))
            for n, (prompt, ids) in enumerate(zip(PROMPTS, expected, strict=True))
            for options in (greedy_turn, sampled_turn)
        )
    )
    assert [one.token_ids for one in heard[::2]] == expected
    assert any(one.judgement.accepted for session in heard[::2] for one in session.rounds)


# --- log probabilities ---------------------------------------------------------------------------------------------


def assert_logprobs(reference, prompt, heard, top):
    """They are those of a plain forward pass over the whole sequence, before any processor."""
    with torch.inference_mode():
        logits = reference.model(input_ids=torch.tensor([[*prompt, *heard.token_ids]]), use_cache=False).logits[0]
    expected = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    assert [known.token_id for known in heard.logprobs] == heard.token_ids
    for row, known in zip(expected, heard.logprobs, strict=True):
        assert known.logprob == pytest.approx(float(row[known.token_id]), rel=0, abs=1e-4)
        best = row.topk(top)
        assert [token_id for token_id, _ in known.top] == best.indices.tolist()
        assert [logprob for _, logprob in known.top] == pytest.approx(best.values.tolist(), rel=0, abs=1e-4)


@pytest.mark.parametrize("top", [0, 1, 5, 20])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.8, top_p=0.9, seed=1),
        SamplingParams(temperature=0.6, rejection=True, seed=2),
        SamplingParams(temperature=1.0, repetition_penalty=1.5, logit_bias=((3, 5.0),), seed=3),
    ],
    ids=["greedy", "coupled", "rejection", "penalized"],
)
def test_logprobs_equal_a_full_forward(tiny, engine_of, params, top):
    """Log probabilities of chosen and of most probable tokens are those of one forward pass over the final sequence,
    whatever part of each block was accepted, under every rule."""
    reference, engine = tiny.reference("llama"), engine_of("llama")
    options = turn(params, top_logprobs=top)
    alone = [run(speak(engine, prompt, options)) for prompt in PROMPTS]
    heard = together(
        *(
            told(
                engine, prompt, options, Guesser([*prompt, *output.token_ids], n, params.rejection, best_of(reference))
            )
            for n, (prompt, output) in enumerate(zip(PROMPTS, alone, strict=True))
        )
    )
    assert any(0 < one.judgement.accepted < len(one.proposal) for session in heard for one in session.rounds)
    for prompt, one in zip(PROMPTS, heard, strict=True):
        assert_logprobs(reference, prompt, one, top)


def test_no_logprobs_behind_the_end_of_a_turn(tiny, engine_of):
    """When a turn ends inside an accepted block there are as many log probabilities as tokens, and none behind the
    end, wherever in the block it is."""
    reference, engine = tiny.reference("llama"), engine_of("llama")
    prompt = PROMPTS[1]
    truth = reference.greedy(prompt, NEW)
    whole_blocks = [*prompt, *truth]

    def oracle(tokens, most):
        return whole_blocks[len(tokens) : len(tokens) + most], []

    for count in range(1, 2 * engine.width):
        ends = [turn(SamplingParams(), max_new_tokens=count)]
        if truth[count - 1] not in truth[: count - 1]:
            ends.append(turn(SamplingParams(), stop_token_ids=frozenset(truth[count - 1 : count])))
        for options in ends:
            heard = run(told(engine, prompt, replace(options, top_logprobs=2), oracle))
            assert heard.token_ids == truth[:count]
            assert_logprobs(reference, prompt, heard, 2)
