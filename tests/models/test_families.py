"""Model families: those that run say what `generate` says, the others are refused at load with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from specpair.errors import ModelLoadError
from specpair_runtime.serving import ServiceStatus
from specpair_target.config import TargetConfig
from specpair_target.engine import Engine

from ..target.driving import PROPOSERS, greedy, speak, together
from ..tiny import Reference, random_ids
from .families import BLOOM, GPT_OSS, LLAMA_4, LONG_ROPE, RECURRENT, SERVED, SHORT, WINDOW, save_family

CHUNK = 16
# One token, around a chunk of prefill, longer than the sliding window, and several of each.
PROMPTS = [random_ids(length) for length in (1, CHUNK, CHUNK + 1, WINDOW + 3, 75, 100)]
NEW = 14
RUNS = [(name, attention) for name in SERVED for attention in ("sdpa", "eager")]
RUNS += [(GPT_OSS, "eager"), (LONG_ROPE, "sdpa"), (LONG_ROPE, "eager")]


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    """Directories of tiny models, each made when it is first asked for."""
    root = tmp_path_factory.mktemp("families")
    return lambda name: save_family(name, root)


@pytest.fixture(scope="module")
def reference_of(path_of):
    """transformers on the same weights, with eager attention: the one that every family computes in full."""
    references = {}

    def reference(name):
        if name not in references:
            model = AutoModelForCausalLM.from_pretrained(path_of(name), attn_implementation="eager")
            references[name] = Reference(model.eval())
        return references[name]

    return reference


def load(path, attention="sdpa", max_length=SHORT):
    config = TargetConfig(
        model=path,
        attn_implementation=attention,
        dtype="fp32",
        device="cpu",
        slots=4,
        max_length=max_length,
        prefill_chunk=CHUNK,
        threads=1,
    )
    return Engine.load(config, ServiceStatus())


@pytest.mark.parametrize(("family", "attention"), RUNS)
def test_equals_generate(path_of, reference_of, family, attention):
    """Every session says what `generate` says, several at a time and half of what is proposed being wrong, with
    prompts longer than a chunk of prefill and than the sliding window."""
    reference = reference_of(family)
    expected = [reference.greedy(prompt, NEW) for prompt in PROMPTS]
    assert sum(len(set(ids)) for ids in expected) > len(PROMPTS) * NEW // 2
    engine = load(path_of(family), attention)
    try:
        outputs = together(
            *(
                speak(engine, prompt, greedy(NEW), PROPOSERS["half"]([*prompt, *ids]))
                for prompt, ids in zip(PROMPTS, expected, strict=True)
            )
        )
    finally:
        engine.stop()
    assert [output.token_ids for output in outputs] == expected
    assert sum(output.accepted for output in outputs) > 0


def test_the_reference_notices_the_window(reference_of):
    """The tiny models are sensitive enough: without its sliding window a model says something else."""
    prompt = PROMPTS[-1]
    assert reference_of("Mistral").greedy(prompt, NEW) != reference_of("Mistral, sliding window").greedy(prompt, NEW)
    assert reference_of("Qwen2").greedy(prompt, NEW) != reference_of("Qwen2, sliding layers").greedy(prompt, NEW)


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_recurrent_families_are_refused(path_of, family, attention):
    """A state that cannot be rolled back to an earlier position is refused by name, before weights are loaded."""
    with pytest.raises(ModelLoadError, match="recurrent state, which cannot be rolled back") as refused:
        load(path_of(family), attention)
    assert refused.value.field == "model"


@pytest.mark.parametrize(
    ("family", "attention", "reason"),
    [
        (BLOOM, "sdpa", "does not run on a slot cache"),
        (BLOOM, "eager", "does not run on a slot cache"),
        (LLAMA_4, "sdpa", "chunked_attention"),
        # The sinks of this model are too small to move its logits by much: nothing but their presence tells.
        (GPT_OSS, "sdpa", "attention sinks.*--attn-implementation eager may help"),
        (GPT_OSS, "flex_attention", "attention sinks.*--attn-implementation eager may help"),
    ],
)
def test_families_that_would_answer_nonsense_are_refused(path_of, family, attention, reason):
    """What the slot cache or an attention cannot compute is refused at load, with the reason and with what may help."""
    with pytest.raises(ModelLoadError, match=reason) as refused:
        load(path_of(family), attention)
    assert refused.value.field == "model"


def test_positions_with_other_rotary_frequencies_are_refused(path_of):
    """LongRoPE models are served as far as one set of frequencies goes: beyond it a token would depend on its
    neighbours."""
    with pytest.raises(ModelLoadError, match=f"at most {SHORT}") as refused:
        load(path_of(LONG_ROPE), max_length=SHORT + 1)
    assert refused.value.field == "max_length"


def test_the_documentation_lists_what_is_tested():
    """Each family of these tests has its row in docs/models.md, which says what they show."""
    text = (Path(__file__).resolve().parents[2] / "docs/models.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    said = {name: (sdpa, eager) for names, sdpa, eager, *_ in rows for name in (names, *names.split(", "))}
    assert {name: said[name] for name in SERVED} == dict.fromkeys(SERVED, ("runs", "runs"))
    assert said[GPT_OSS] == ("refused", "runs")
    assert {said[name] for name in (BLOOM, LLAMA_4, *RECURRENT)} == {("refused", "refused")}
