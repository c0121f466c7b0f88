"""What a caller asks for: how to sample and when to stop.

None stands for the server's default, which the proto files state. Values are validated at the target alone, so that
there is one truth about what is allowed; see `wire` for what cannot be sent at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["AcceptanceRule", "ChatMessage", "Prediction", "Prompt", "SamplingParams"]

ChatMessage = Mapping[str, str]
"""One message of a conversation, for example {"role": "user", "content": "Hello"}."""

Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""What to continue: text, token ids, or a conversation that the target renders with its chat template."""

Prediction = str | Sequence[int]
"""What a caller expects as the output, as text or token ids: a file that is to be changed in a few places, say.

It is looked up in like the session's own text, and its beginning is proposed at once. Right or wrong, it changes the
speed alone. Text is tokenized by itself: where the end of the prompt and its beginning would make one token together,
the first round brings one token, and the prediction is met again behind it.
"""


class AcceptanceRule(StrEnum):
    """How the target judges a proposed token."""

    COUPLED = "coupled"
    """Accepted if it is the target's own choice under shared noise: the output does not depend on the proposer.

    Daliri, Musco and Suresh 2024 (arXiv 2408.07978).
    """
    REJECTION = "rejection"
    """Accepted with probability min(1, target/draft), Leviathan et al. 2023, Algorithm 1: the target's distribution,
    but not the same draw for every proposer or division into rounds; a client with a fixed `draft_length` repeats its
    output, if it has no lookups beside a draft service. A draft that names other probabilities than it sampled with
    changes the distribution."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the target chooses tokens and when a generation ends.

    Temperature 0, the default, is greedy. With a temperature, the same seed, prompt and parameters give the same
    tokens, whatever the draft. `logprobs=n` reports the log probability of each token and of the n most probable ones.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    rule: AcceptanceRule | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
