"""What sessions of one client pass on: knowledge of speed, never tokens."""

from __future__ import annotations

from specpair.experience import Experience
from specpair.pacing import Round
from specpair.params import SamplingParams
from specpair.results import Source

GREEDY, WARM = SamplingParams(), SamplingParams(temperature=0.8)


def rounds(pacer, accepted):
    """Twenty rounds of four ids, of which so many are accepted; the draft takes as long as the target."""
    for number in range(20):
        pacer.observe(Round(number, Source.MODEL, 4, 4, accepted, 0.004, 0.004))
    return pacer


def test_a_new_session_knows_what_the_last_one_learned():
    """Where nothing was accepted the next session's first round is a plain one, and where all was, a long one."""
    experience = Experience()
    assert experience.begin().pacer(GREEDY).draft_length(7) == 4
    for accepted, expected in ((0, 0), (4, 7)):
        knows = experience.begin()
        for _ in range(10):
            rounds(knows.pacer(GREEDY), accepted)
        experience.keep(knows)
        assert experience.begin().pacer(GREEDY).draft_length(7) == expected


def test_greedy_and_sampled_sessions_are_paced_apart():
    """How often a draft is right depends on the temperature: one manner's failures do not slow the other."""
    experience = Experience()
    knows = experience.begin()
    rounds(knows.pacer(WARM), 0)
    experience.keep(knows)
    assert experience.begin().pacer(GREEDY).draft_length(7) == 4


def test_sessions_at_the_same_time_do_not_disturb_each_other():
    """What one session learns is not seen by those that have begun before it ended."""
    experience = Experience()
    early, late = experience.begin(), experience.begin()
    rounds(late.pacer(GREEDY), 0)
    experience.keep(late)
    assert early.pacer(GREEDY).draft_length(7) == 4


def test_a_fixed_chain_stays_fixed():
    """A number of blocks that the caller chose is that of every session."""
    assert Experience(3).begin().depth.blocks == 3
