"""Token equality: whoever proposes, the target says what it would have said alone."""

from __future__ import annotations

import pytest

from ..tiny import FAMILIES, random_ids
from .driving import PROPOSERS, greedy, speak, together

# One token, around a block, around a chunk of prefill, around the first attended length of 256, and beyond.
SHORT = (1, 2, 3, 5, 7, 8, 9, 15, 16, 31, 32, 33, 34, 48, 64, 65)
LONG = (97, 128, 150, 200, 232, 239, 247, 250, 255, 256, 257, 300)
PROMPTS = [random_ids(length) for length in (*SHORT, *LONG)]
NEW = 18
# Every width for one family, an odd one and the default for the others.
CASES = [("llama", width) for width in (1, 2, 4, 8)] + [(family, width) for family in FAMILIES[1:] for width in (3, 8)]


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize(("family", "width"), CASES)
def test_equals_generate(tiny, engine_of, family, width, proposer):
    """In fp32 every session's tokens are those of `generate`, whoever proposes how many ids, 8 sessions at a time and
    more waiting for a slot."""
    reference = tiny.reference(family)
    expected = [reference.greedy(prompt, NEW) for prompt in PROMPTS]
    assert all(len(set(ids)) > NEW // 4 for ids in expected)
    engine = engine_of(family, verify_width=width)
    outputs = together(
        *(
            speak(engine, prompt, greedy(NEW), PROPOSERS[proposer]([*prompt, *ids]))
            for prompt, ids in zip(PROMPTS, expected, strict=True)
        )
    )
    assert [output.token_ids for output in outputs] == expected
    accepted = sum(output.accepted for output in outputs)
    assert (accepted > 0) == (proposer not in ("nobody", "liar") and width > 1)
