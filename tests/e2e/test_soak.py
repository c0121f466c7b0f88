"""The soak in small: every kind of client on a pair that is killed, and one that is left alone."""

from __future__ import annotations

from ..soak.running import Plan, soak
from .processes import DEMO, run

PLAN = Plan(seconds=5.0, interval=3.0, clients=4, steady_clients=1, texts=2, sample_every=0.2)


def test_clients_on_a_pair_that_is_killed(bf16, tmp_path):
    """Target and draft are killed once each: tokens are those of the reference, errors have a type, nothing grows."""
    models = (DEMO / "target", DEMO / "draft")
    outcome = run(soak(PLAN, bf16.target, bf16.draft, models, tmp_path), 300)
    assert outcome.faults() == []
    assert outcome.disturbed.counts["resumes"]
    assert outcome.disturbed.counts["compared"]
    assert outcome.steady.counts["compared"]
