"""The state of a session: its tokens, and what ends its turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specpair.errors import SpecpairError
from specpair.v1.common_pb2 import FinishReason
from specpair_runtime.sampling.history import TokenHistory
from specpair_runtime.sampling.logprobs import PositionLogprobs
from specpair_runtime.sampling.params import GREEDY, SamplingParams
from specpair_runtime.serving import Stopwatch
from specpair_target.text import TextStream

__all__ = ["ChatMessage", "Commit", "Session", "TurnOptions"]

ChatMessage = dict[str, str]


@dataclass(frozen=True)
class TurnOptions:
    """How one turn is sampled, what is reported of it, and what ends it.

    `top_logprobs` None reports no log probabilities; `max_new_tokens` None ends the turn when the cache is full;
    `traced` keeps what judgements were based on.
    """

    sampling: SamplingParams = GREEDY
    top_logprobs: int | None = None
    traced: bool = False
    max_new_tokens: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Commit:
    """Tokens that became part of the output, the text of each, and the log probabilities of each if asked for."""

    token_ids: list[int]
    texts: list[str]
    logprobs: Sequence[PositionLogprobs]
    finish_reason: FinishReason.ValueType
    stop_string: str


@dataclass(eq=False)
class Session:
    """One stream's state.

    It belongs to the engine thread from the moment its prompt is handed over until the last of its blocks is answered:
    that thread prefills, steps and commits. Before, and between one turn's last answer and the next turn's prompt, it
    belongs to the event loop. `closed` is set by the event loop at any time: from then on nobody looks at the rest.
    `messages` is the conversation of a session that was opened with one, the answers included.
    `tokens` are all committed tokens. The KV of the first `kv_length` of them is in the slot; between two steps that
    is all but the last one, whose logits the next step asks for.
    """

    id: str
    tokens: list[int]
    prompt_length: int
    max_length: int
    options: TurnOptions
    text: TextStream | None
    slot: int = -1
    kv_length: int = 0
    finish_reason: FinishReason.ValueType = FinishReason.FINISH_REASON_UNSPECIFIED
    closed: bool = False
    failure: SpecpairError | None = None
    history: TokenHistory | None = None
    messages: list[ChatMessage] = field(default_factory=list)
    prefill: Stopwatch = field(default_factory=Stopwatch)
    """From a turn's prompt being handed over until it is in the slot, other sessions' turns at the engine included."""
    _answer: list[str] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Committed tokens, prompt included."""
        return len(self.tokens)

    @property
    def prefilled(self) -> bool:
        """Whether the slot holds the prompt's KV; the prompt's last token is fed by the first step."""
        return self.kv_length >= self.prompt_length - 1

    @property
    def caught_up(self) -> bool:
        """Whether the slot holds the KV of all tokens but the last one."""
        return self.kv_length == len(self.tokens) - 1

    @property
    def answer(self) -> str:
        """The text of this turn so far."""
        return "".join(self._answer)

    def begin_turn(self, tokens: Sequence[int], options: TurnOptions, text: TextStream | None) -> int:
        """Starts the next turn with `tokens` as its prompt, the whole session from its first token on.

        Returns how many of them the slot still holds: what the turns so far have in common with them.
        """
        kept = 0
        for old, new in zip(self.tokens[: self.kv_length], tokens[:-1], strict=False):
            if old != new:
                break
            kept += 1
        self.kv_length = kept
        self.tokens = list(tokens)
        self.prompt_length = len(tokens)
        self.options = options
        self.text = text
        self.history = None
        self.finish_reason = FinishReason.FINISH_REASON_UNSPECIFIED
        self._answer = []
        return kept

    def commit(self, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs] = ()) -> Commit:
        """Appends tokens one by one until one of them ends the turn; what comes after it never happened."""
        committed: list[int] = []
        texts: list[str] = []
        stop_string = ""
        for token_id in token_ids:
            self.tokens.append(token_id)
            committed.append(token_id)
            # What a stop token says is not searched: it ends the turn by itself.
            search = token_id not in self.options.stop_token_ids
            update = self.text.push(token_id, search=search) if self.text is not None else None
            texts.append(update.released if update is not None else "")
            stop_string = update.stop_string if update is not None else ""
            self.finish_reason = self._finish_reason(token_id, stop_string)
            if self.finish_reason:
                break
        if self.finish_reason and self.text is not None:
            texts[-1] += self.text.flush()
        self._answer += texts
        return Commit(committed, texts, logprobs[: len(committed)], self.finish_reason, stop_string)

    def _finish_reason(self, token_id: int, stop_string: str) -> FinishReason.ValueType:
        if token_id in self.options.stop_token_ids:
            return FinishReason.FINISH_REASON_STOP_TOKEN
        if stop_string:
            return FinishReason.FINISH_REASON_STOP_STRING
        if self.length - self.prompt_length == self.options.max_new_tokens:
            return FinishReason.FINISH_REASON_MAX_NEW_TOKENS
        # The last token needs no position of its own: nothing attends to it any more.
        if self.length > self.max_length:
            return FinishReason.FINISH_REASON_CACHE_FULL
        return FinishReason.FINISH_REASON_UNSPECIFIED
