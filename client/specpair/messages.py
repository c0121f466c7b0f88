"""The messages of the protocol as plain data: what `loop` computes with and what transports carry.

The proto files are the reference for the meaning of each field; `wire` converts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from specpair.params import Prompt, SamplingParams
from specpair.request import RequestContext
from specpair.results import FinishReason, Logprobs, Source

__all__ = [
    "Block",
    "Committed",
    "DraftAsk",
    "DraftStart",
    "DraftStarted",
    "Explain",
    "Extend",
    "Fingerprint",
    "ModelInfo",
    "Phase",
    "Proposal",
    "SparseDistribution",
    "Start",
    "Started",
    "Verdict",
]


class Phase(StrEnum):
    """Where a service stands between start and stop."""

    UNSPECIFIED = "unspecified"
    LOADING = "loading"
    COMPILING = "compiling"
    WARMING_UP = "warming_up"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What must agree between a draft and a target."""

    vocabulary_size: int
    vocabulary_sha256: str = ""
    special_tokens_sha256: str = ""
    eos_token_ids: tuple[int, ...] = ()
    chat_template_sha256: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a service runs."""

    model: str = ""
    phase: Phase = Phase.UNSPECIFIED
    progress: float = 0.0
    detail: str = ""
    fingerprint: Fingerprint | None = None
    architecture: str = ""
    parameters: int = 0
    dtype: str = ""
    quantization: str = ""
    device: str = ""
    attn_implementation: str = ""
    compiled: bool = False
    verify_width: int = 0
    max_length: int = 0
    slots: int = 0
    slots_in_use: int = 0
    recompilations: int = 0
    version: str = ""
    proposers: tuple[Source, ...] = ()
    chat: bool = False
    parallel: int = 0
    """Processes that hold a part of the weights each; 1 where one holds all, 0 where that is not known."""
    identity: str = ""
    """Of a target: a digest of what decides its output besides the request."""


@dataclass(frozen=True, slots=True)
class Start:
    """Opens a session at the target, for Verify and for Generate alike."""

    prompt: Prompt
    params: SamplingParams
    committed_token_ids: tuple[int, ...] = ()
    request: RequestContext | None = field(default=None, compare=False, repr=False)
    """What the call is part of; never in the message."""


@dataclass(frozen=True, slots=True)
class Extend:
    """Opens a session's next turn at the target."""

    prompt: Prompt
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Started:
    """The target's answer to `Start` and to `Extend`: `prompt_token_ids` stand behind the first `cached_tokens`."""

    session_id: str
    prompt_token_ids: tuple[int, ...]
    cached_tokens: int
    length: int
    max_block_tokens: int
    max_length: int
    identity: str = ""
    """As in ModelInfo."""


@dataclass(frozen=True, slots=True)
class SparseDistribution:
    """A probability distribution over a few ids."""

    token_ids: tuple[int, ...]
    probs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A proposal for the target to verify."""

    round: int
    base_length: int
    last_token_id: int | None
    """None: whatever it is, the block continues it."""
    token_ids: tuple[int, ...]
    source: Source
    draft_probs: tuple[SparseDistribution, ...] = ()
    more_steps: int = 0
    """Plain steps behind this one, each a round of its own."""


@dataclass(frozen=True, slots=True)
class Explain:
    """Asks why the target would accept or reject each id of a proposal behind a prompt."""

    prompt: Prompt
    params: SamplingParams
    token_ids: Sequence[int]
    draft_probs: tuple[SparseDistribution, ...] = ()


@dataclass(frozen=True, slots=True)
class Committed:
    """Tokens that the target has made part of the output."""

    token_ids: tuple[int, ...]
    text_delta: str
    text_lengths: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_string: str = ""
    base_length: int | None = None
    """Tokens of the session before these; None where the message around them says so, or nobody does."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The target's answer to a block."""

    round: int
    stale: bool
    base_length: int
    accepted: int
    committed: Committed
    queue_us: int = 0
    forward_us: int = 0
    judge_us: int = 0


@dataclass(frozen=True, slots=True)
class DraftStart:
    """Opens a session at the draft, or its next turn: `token_ids` are the whole session."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    proposer: Source | None = None
    session_id: str = ""
    prompt_length: int | None = None
    """How many of the ids are the turn's prompt; None: all of them."""
    request: RequestContext | None = field(default=None, compare=False, repr=False)
    """What the call is part of; never in the message."""


@dataclass(frozen=True, slots=True)
class DraftStarted:
    """The draft's answer to `DraftStart`."""

    proposer: Source | None
    max_length: int
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True, slots=True)
class DraftAsk:
    """Asks for proposals: from `from_position` on, the session's tokens are now `token_ids`."""

    round: int
    from_position: int
    token_ids: tuple[int, ...]
    max_tokens: int
    proposals: int = 1
    """How many to send; each further one continues the one before it."""
    min_confidence: float = 0.0
    """A proposal may end where the draft's probability of all of it falls below this; 0: it does not."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Ids that the draft expects behind the first `base_length` tokens of the session."""

    round: int
    base_length: int
    token_ids: tuple[int, ...]
    source: Source
    draft_probs: tuple[SparseDistribution, ...] = ()
    draft_us: int = 0
    confidence: tuple[float, ...] = ()
    """The draft's own probability of each id, given those before it; empty if it was not asked for."""
    index: int = 0
    """Which of the ask's proposals this is."""
    plain: int = 0
    """With no ids: for how many rounds more there will be none, never on the wire."""
    asked: int = 0
    """Ids that the proposer meant the block to have, never on the wire: fewer may have been found, or worth it."""
