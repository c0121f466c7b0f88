"""What speculation can gain: the formulas that measured speed-ups are held against.

A round proposes k tokens, each accepted with chance a if those before it were. All times are in units of one plain step
of the target: c to draft one token, v to verify a block, r for the round trip. Serial: Leviathan et al. 2023
(arXiv 2211.17192), theorem 3.8 with v and r added. Overlapped: PEARL (arXiv 2408.11850), with the target's own token
guessed too.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Costs", "acceptance_per_token", "best_length", "expected_tokens", "pipelined_speedup", "serial_speedup"]


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, as measured."""

    plain: float
    """One token of the target alone."""
    draft: float
    """One proposed token."""
    verify: float
    """One step of the target over a block."""
    round_trip: float = 0.0
    """Everything else that a round must wait for."""


def expected_tokens(acceptance: float, draft_length: int) -> float:
    """Tokens per round, 1 + a + ... + a^k: Leviathan et al. 2023, equation 1."""
    return sum(acceptance**power for power in range(draft_length + 1))


def acceptance_per_token(tokens_per_round: float, draft_length: int) -> float:
    """The rate a for which 1 + a + ... + a^k, k the draft length, is the number of tokens per round.

    Accepted per proposed token is another, lower figure: proposals behind a rejected one count as rejected there.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if expected_tokens(middle, draft_length) < tokens_per_round:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def serial_speedup(acceptance: float, draft_length: int, costs: Costs) -> float:
    """Over plain decoding, when draft and target work in turn: E(k) / (k c + v + r)."""
    seconds = draft_length * costs.draft + costs.verify + costs.round_trip
    return expected_tokens(acceptance, draft_length) * costs.plain / seconds


def pipelined_speedup(acceptance: float, draft_length: int, costs: Costs) -> float:
    """Over plain decoding, when the draft works on the next block while the target verifies this one.

    That helps where the whole block and the draft's guess of the token behind it come true, with chance a^(k+1); such a
    round takes max(k c, v) + r, every other one the serial time.
    """
    drafting = draft_length * costs.draft
    right = acceptance ** (draft_length + 1)
    seconds = right * max(drafting, costs.verify) + (1 - right) * (drafting + costs.verify) + costs.round_trip
    return expected_tokens(acceptance, draft_length) * costs.plain / seconds


def best_length(acceptance: float, longest: int, costs: Costs) -> int:
    """The draft length from 0 to `longest` with the highest pipelined speed-up; the shortest of equals."""
    return max(range(longest + 1), key=lambda length: pipelined_speedup(acceptance, length, costs))
