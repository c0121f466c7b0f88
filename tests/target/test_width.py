"""The verify width that a service chooses for itself."""

from __future__ import annotations

import pytest

from specpair_target.config import TargetConfig
from specpair_target.width import CANDIDATES, best_width, expected_tokens, step_costs

from ..tiny import random_ids
from .driving import greedy, run, speak


@pytest.mark.parametrize("acceptance", [0.1, 0.5, 0.7, 0.95])
def test_expected_tokens_follow_the_paper(acceptance):
    """Leviathan et al., equation 1: (1 - a^(k+1)) / (1 - a) for k = width - 1 proposals."""
    for width in CANDIDATES:
        closed = (1 - acceptance**width) / (1 - acceptance)
        assert expected_tokens(width, acceptance) == pytest.approx(closed)


def test_the_width_with_the_most_tokens_for_its_cost():
    """Where rows are free the widest that still gains, where every row costs as much as a step none, and between
    widths that are worth the same the cheapest."""
    assert best_width(dict.fromkeys(CANDIDATES, 1.0), 0.9) == 16
    assert best_width({width: float(width) for width in CANDIDATES}, 0.9) == 1
    # At 0.3 nearly nothing comes behind the fourth row: wider steps at the same cost are worth the same.
    assert best_width({width: 1.0 + width / 1000 for width in CANDIDATES}, 0.3) == 4
    assert best_width({2: 1.0, 4: 1.7, 8: 5.0}, 0.7) == 2
    assert best_width({2: 1.0, 4: 1.3, 8: 1.5}, 0.7) == 8


def test_auto_is_a_width_like_any_other(load, tiny):
    """The engine takes one of the candidates, in fp32 none whose bits depend on the company, fills blocks up to it, and
    says what `generate` says."""
    engine = load("llama", slots=2, verify_width="auto")
    assert engine.width in [width for width in CANDIDATES if width >= 4]
    prompt = random_ids(9)
    truth = tiny.reference("llama").greedy(prompt, 20)
    output = run(speak(engine, prompt, greedy(20), lambda tokens, most: [*prompt, *truth][len(tokens) :][:most]))
    assert output.token_ids == truth
    assert output.rounds == -(-20 // engine.width)


def test_every_candidate_is_measured(engine_of):
    """A time for each, and for no other width."""
    costs = step_costs(engine_of("llama").model.runner, (1, 4, 8))
    assert list(costs) == [1, 4, 8]
    assert min(costs.values()) > 0


@pytest.mark.parametrize(("text", "width"), [("auto", "auto"), ("1", 1), ("64", 64), (12, 12)])
def test_widths_that_can_be_asked_for(text, width):
    """A number, from a flag or from a file, or auto."""
    assert TargetConfig(model="x", verify_width=text).verify_width == width


@pytest.mark.parametrize("text", ["0", "65", "-1", "wide", "", "4.0", 0, 65, 4.5, True])
def test_widths_that_are_refused(text, capsys):
    """One line with the field and what it must be."""
    with pytest.raises(SystemExit) as end:
        TargetConfig.parse(["--model=x", f"--verify-width={text}"])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"error: verify_width: must be auto or a number from 1 to 64, got '{text}' (from --verify-width)"]
