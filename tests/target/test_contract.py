"""The same bits, whatever happens: outputs and caches do not depend on proposals, neighbours, or a broken connection.

The engine is compared with itself without proposals, since in low precision `generate` rounds differently.
"""

from __future__ import annotations

import pytest
import torch

from specpair_draft.asks import Turn
from specpair_draft.steps import STEP_WIDTHS
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.serving_model import load_serving_model
from specpair_runtime.serving import ServiceStatus

from .. import plain
from ..draft.driving import Alone
from ..tiny import FAMILIES, random_ids
from .driving import PROPOSERS, greedy, nobody, run, sampled, speak, together

NEW = 20
LENGTHS = (1, 4, 8, 21, 33, 64, 101, 200, 238, 249, 255, 257)
PROMPTS = [random_ids(length, seed=1) for length in LENGTHS]
# One for each prompt in turn, so that neighbours in a step sample differently.
OPTIONS = [
    greedy(NEW),
    sampled(NEW, temperature=0.7, seed=1),
    sampled(NEW, temperature=1.0, top_k=20, seed=2**64 - 2**63 - 5),
    sampled(NEW, temperature=1.5, top_p=0.9, seed=-3),
    sampled(NEW, temperature=1.0, min_p=0.05, seed=4),
]
CASES = [(prompt, OPTIONS[number % len(OPTIONS)]) for number, prompt in enumerate(PROMPTS)]
# Without blocks of four rows at least, fp32 products over one row and over several round differently.
FORMATS = [
    *(("llama", {"dtype": "bf16", "verify_width": width}) for width in (1, 2, 4)),
    *((family, {"dtype": "bf16"}) for family in FAMILIES),
    ("llama", {"dtype": "fp32", "verify_width": 4}),
    ("llama", {"dtype": "fp32"}),
    ("llama-blocks", {"dtype": "bf16", "quantization": "int8"}),
    ("llama-blocks", {"dtype": "bf16", "quantization": "nf4"}),
    ("llama-blocks", {"dtype": "bf16", "quantization": "fp4"}),
]
IDS = ["-".join(map(str, (family, *config.values()))) for family, config in FORMATS]


def alone(engine):
    """What each case says with nobody proposing and nobody beside it."""
    return [run(speak(engine, prompt, options, keep_kv=True)) for prompt, options in CASES]


@pytest.mark.parametrize(("family", "config"), FORMATS, ids=IDS)
def test_the_same_output_and_cache_whoever_proposes(engine_of, family, config):
    """Greedy and sampled sessions, side by side on all slots and with proposals of any kind and length, say what each
    says alone and without proposals, and leave bit for bit the same keys and values."""
    engine = engine_of(family, **config)
    expected = alone(engine)
    assert all(len(set(output.token_ids)) > 3 for output in expected)
    for proposer in PROPOSERS:
        outputs = together(
            *(
                speak(engine, prompt, options, PROPOSERS[proposer]([*prompt, *output.token_ids]), keep_kv=True)
                for (prompt, options), output in zip(CASES, expected, strict=True)
            )
        )
        assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
        for output, own in zip(outputs, expected, strict=True):
            assert torch.equal(output.kv, own.kv)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"dtype": "fp32"}),
        ("mistral-sliding", {"dtype": "bf16"}),
        ("llama-blocks", {"dtype": "bf16", "quantization": "nf4"}),
        ("llama-blocks", {"dtype": "bf16", "quantization": "int8"}),
    ],
    ids=["fp32", "bf16", "nf4", "int8"],
)
def test_resume_goes_on_with_the_same_tokens_and_bits(engine_of, family, config):
    """A session that is opened again with what it had committed says the rest, wherever it broke off, and its cache is
    bit for bit that of a session that was never interrupted."""
    engine = engine_of(family, **config)
    for prompt, options in ((PROMPTS[1], OPTIONS[1]), (PROMPTS[4], OPTIONS[0]), (PROMPTS[8], OPTIONS[3])):
        whole = run(speak(engine, prompt, options, keep_kv=True))
        ids = whole.token_ids
        half = PROPOSERS["half"]
        resumed = together(
            *(
                speak(engine, prompt, options, half([*prompt, *ids]), committed=ids[:cut], keep_kv=True)
                for cut in range(NEW)
            )
        )
        for cut, output in enumerate(resumed):
            assert output.token_ids == ids[cut:]
            assert torch.equal(output.kv, whole.kv)


@pytest.mark.parametrize("options", OPTIONS[1:], ids=["temperature", "top-k", "top-p", "min-p"])
def test_sampling_follows_its_definition(tiny, engine_of, options):
    """A sampled token is the argmax of transformers' processed logits plus the noise of its seed, position and id."""
    reference = tiny.reference("llama")
    for prompt in PROMPTS[:3]:
        tokens = list(prompt)
        for _ in range(10):
            tokens.append(plain.choose(reference.logits(tokens), len(tokens), options.sampling))
        said = run(speak(engine_of("llama"), prompt, options)).token_ids
        assert said[:10] == tokens[len(prompt) :]


def test_another_seed_says_something_else(engine_of):
    """The seed decides: each of several seeds has an output of its own, and the same one again."""
    engine = engine_of("llama")

    def outputs():
        cases = [sampled(NEW, temperature=1.0, seed=seed) for seed in (0, 1, 2**32, -1, 2**62)]
        return [tuple(output.token_ids) for output in together(*(speak(engine, PROMPTS[3], case) for case in cases))]

    first = outputs()
    assert len(set(first)) == len(first)
    assert outputs() == first


def test_a_session_says_alone_what_it_says_in_company(engine_of):
    """Eight sessions at once, and more than there are slots one after another, say what each says alone."""
    engine = engine_of("llama")
    expected = [output.token_ids for output in alone(engine)]
    cases = [(case, ids) for _ in range(3) for case, ids in zip(CASES, expected, strict=True)]
    assert len(cases) > 4 * engine.pool.slots
    outputs = together(*(speak(engine, prompt, options, nobody) for (prompt, options), _ in cases))
    assert [output.token_ids for output in outputs] == [ids for _, ids in cases]
    assert engine.pool.in_use == 0


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7, "seed": 1},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": -9},
        {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "seed": 3},
        {"temperature": 0.9, "logit_bias": ((5, 4.0), (7, -100.0)), "seed": 2**40},
    ],
    ids=["greedy", "temperature", "truncated", "penalized", "biased"],
)
def test_a_draft_of_the_same_model_is_always_right(tiny, engine_of, params):
    """A draft that is the target itself, with its processors and its noise, has every proposal accepted."""
    config = ModelConfig(model=tiny.path("llama"), dtype="fp32", device="cpu", slots=2, max_length=384, threads=1)
    runner = load_serving_model(config, STEP_WIDTHS, ServiceStatus()).runner
    for prompt in PROMPTS[::3]:
        options = sampled(NEW, **params)
        draft = Alone(runner, 1, 32)
        draft.begin(Turn(prompt, len(prompt), options.sampling))

        def propose(tokens, most, draft=draft):
            draft.follow(min(draft.length, len(tokens)), tokens[draft.length :])
            return draft.propose(most).token_ids

        engine = engine_of("llama")
        output = run(speak(engine, prompt, options, propose))
        assert output.rounds == -(-NEW // engine.width)
        assert output.token_ids == run(speak(engine, prompt, options)).token_ids
