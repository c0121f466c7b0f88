"""Why an early end of the rejection rule keeps the sample that caused it, in exact fractions."""

from __future__ import annotations

from fractions import Fraction

from specpair_runtime.sampling.law import acceptance_probability, residual_weights

TARGET = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]
DRAFT = [Fraction(1, 4), Fraction(1, 4), Fraction(1, 2)]


def output(judged):
    """The distribution of a place's token when a sample is judged if `judged(id)`, and the target's own draw if not."""
    weights = residual_weights(TARGET, DRAFT)
    residual = [weight / sum(weights) for weight in weights]
    said = [Fraction(0)] * 3
    for id_, draft_prob in enumerate(DRAFT):
        accepted = acceptance_probability(TARGET[id_], draft_prob) if judged(id_) else Fraction(0)
        instead = residual if judged(id_) else TARGET
        said[id_] += draft_prob * accepted
        for other in range(3):
            said[other] += draft_prob * (1 - accepted) * instead[other]
    return said


def test_a_sample_must_not_be_left_out_for_what_it_is():
    """Judging every sample, or none, gives the target's distribution; judging only those that the draft was confident
    of gives another one. So whether a place is proposed may depend on what stands before it, and not on its sample."""
    assert output(lambda id_: True) == output(lambda id_: False) == TARGET
    assert output(lambda id_: DRAFT[id_] >= Fraction(1, 2)) != TARGET
