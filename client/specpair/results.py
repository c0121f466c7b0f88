"""What a caller gets: tokens with their provenance, chunks of a stream, the result and its statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate

__all__ = [
    "Chunk",
    "FinishReason",
    "Logprobs",
    "PositionExplanation",
    "ProposerChange",
    "Result",
    "Source",
    "Stats",
    "Token",
]


class Source(StrEnum):
    """Who proposed a token. The target judged every one of them."""

    TARGET = "target"
    """Nobody: the target computed it without a proposal, or against one."""
    MODEL = "model"
    NGRAM = "ngram"
    PREDICTION = "prediction"


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    MAX_NEW_TOKENS = "max_new_tokens"
    CACHE_FULL = "cache_full"


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of probabilities at one position."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logarithm of its probability), most probable first."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the output.

    `text` is what the token added to the text: "" when it was held back, as half a character or the beginning of a
    possible stop string is; the token that decides the question then carries the text of both.
    """

    id: int
    text: str
    source: Source
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one round committed. Tokens of a chunk are never taken back."""

    tokens: tuple[Token, ...]
    text: str
    finish_reason: FinishReason | None = None
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class ProposerChange:
    """A generation that goes on with another proposer: n-gram after its draft service was lost, or the model again."""

    round: int
    """The first round of the new proposer, counted from 1."""
    proposer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stats:
    """How a generation went. Durations are in seconds."""

    rounds: int = 0
    """Steps of the target that were applied."""
    rounds_by_source: Mapping[Source, int] = field(default_factory=dict)
    """The same by who proposed; TARGET for plain steps."""
    proposed: int = 0
    proposed_by_source: Mapping[Source, int] = field(default_factory=dict)
    accepted: int = 0
    accepted_by_source: Mapping[Source, int] = field(default_factory=dict)
    draft_lengths: Mapping[int, int] = field(default_factory=dict)
    """How often a block had so many proposed ids, 0 included."""
    reached_by_position: tuple[int, ...] = ()
    """How often an id was proposed for the first, second, ... place of a block with all before it accepted."""
    accepted_by_position: tuple[int, ...] = ()
    """How often that id was accepted too."""
    stale: int = 0
    """Blocks that the target dropped although they should have continued its state."""
    dropped: int = 0
    """Blocks sent ahead of a verdict that turned out otherwise than was assumed, and those lost with a target."""
    resumes: int = 0
    """How often the target was lost and the turn went on where it stood, at the same or another one."""
    prompt_tokens: int = 0
    """In a session's later turns everything before the turn's output."""
    cached_tokens: int = 0
    """Those of the prompt's tokens whose keys and values an earlier turn had left at the target."""
    output_tokens: int = 0
    seconds: float = 0.0
    """From the call to the last token."""
    time_to_first_token: float = 0.0
    proposing_seconds: float = 0.0
    """Waiting for proposals, as the client saw it."""
    drafting_seconds: float = 0.0
    """The draft's forward passes or lookups, as it reports them; run-ahead hides part of it."""
    verifying_seconds: float = 0.0
    """The target's steps, as it reports them."""
    judging_seconds: float = 0.0
    """The part of those behind the forward passes."""
    queued_seconds: float = 0.0
    """Blocks waiting for the target's engine, prefill included, as it reports it."""
    wire_seconds: float = 0.0
    """What is left of waiting for verdicts: the network, serialization and scheduling."""
    proposer: str = "none"
    """Who proposed at the end: "model", "ngram" or "none"."""
    proposer_changes: tuple[ProposerChange, ...] = ()

    @property
    def draft_losses(self) -> int:
        """How often the generation went on without its draft service, a beginning without it included."""
        return sum(change.proposer != "model" for change in self.proposer_changes)

    @property
    def draft_returns(self) -> int:
        """How often the draft service came back in the middle of the generation."""
        return sum(change.proposer == "model" for change in self.proposer_changes)

    @property
    def acceptance_rate(self) -> float:
        """Accepted per proposed token; 0 when nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def acceptance_per_token(self) -> float | None:
        """The chance of each id, given that those before it were accepted, with which blocks of these lengths bring as
        many tokens (Leviathan et al. 2023, equation 1, solved for alpha); None when nothing was proposed."""
        if not self.proposed:
            return None
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            powers = [0.0, *accumulate(middle**i for i in range(1, max(self.draft_lengths) + 1))]
            expected = sum(times * powers[length] for length, times in self.draft_lengths.items())
            low, high = (middle, high) if expected < self.accepted else (low, middle)
        return high

    @property
    def tokens_per_round(self) -> float:
        """Output tokens per step of the target."""
        return self.output_tokens / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second of the whole call, prefill included."""
        return self.output_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class PositionExplanation:
    """Why the token that was proposed for one position was accepted or not."""

    position: int
    proposed_token_id: int | None
    """None behind the last proposal."""
    target_token_id: int
    """The target's own choice here, given the proposal before it."""
    target_prob: float
    """Of the proposed id; behind the last proposal of the target's own."""
    draft_prob: float | None
    """Of the proposed id; None if the draft's probabilities were not given."""
    top2_margin: float
    """Score of the most probable id less that of the second: small margins flip between numeric formats."""
    accepted: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation."""

    text: str
    tokens: tuple[Token, ...]
    prompt_token_ids: tuple[int, ...]
    """In a session's later turns everything before the turn's output."""
    finish_reason: FinishReason
    stats: Stats
    stop_string: str | None = None
    request_id: str = ""
    """Under which the logs of both services have it; that of the session, in one of several turns."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of the output, without the prompt's."""
        return tuple(token.id for token in self.tokens)
