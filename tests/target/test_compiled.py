"""The compiled step: the same tokens, and nothing left to compile once it is warm."""

from __future__ import annotations

import os
import shutil

import pytest

from ..tiny import random_ids
from .driving import PROPOSERS, greedy, run, speak, together

NEW = 12


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
# torch warns about itself while its compiler is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_target_equals_generate_and_compiles_nothing_later(tiny, load):
    """Sessions alone and together, on both sides of an attended length and across it, say what `generate` says; the
    warm-up has compiled all of it."""
    engine = load("llama-small", compile="on", slots=2, max_length=300, verify_width=4)
    reference = tiny.reference("llama-small")
    assert engine.model.runner.compiled
    prompts = [random_ids(length) for length in (1, 5, 40, 249, 252, 270)]
    truths = [reference.greedy(prompt, NEW) for prompt in prompts]
    for proposer in ("half", "nobody"):
        sessions = [
            speak(engine, prompt, greedy(NEW), PROPOSERS[proposer]([*prompt, *truth]))
            for prompt, truth in zip(prompts, truths, strict=True)
        ]
        outputs = [*together(*sessions[:3]), *together(*sessions[3:])]
        assert [output.token_ids for output in outputs] == truths
    for prompt, truth in zip(prompts, truths, strict=True):
        assert run(speak(engine, prompt, greedy(NEW))).token_ids == truth
    assert engine.model.recompilations.count == 0
