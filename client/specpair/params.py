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
    """0, the default, is greedy; otherwise from 0.001 to 100."""
    top_k: int | None = None
    """Keep the k most probable tokens. 0, the default, keeps all."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probability reaches this, in (0, 1]. Default 1."""
    min_p: float | None = None
    """Keep tokens at least so many times as probable as the most probable one, in [0, 1]. Default 0."""
    repetition_penalty: float | None = None
    """Divides positive and multiplies negative logits of tokens of prompt and output, in [0.01, 100]. Default 1."""
    presence_penalty: float | None = None
    """Subtracted from the logit of each generated token, in [-2, 2]. Default 0."""
    frequency_penalty: float | None = None
    """Subtracted once for each time that a token was generated, in [-2, 2]. Default 0."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids: at most 1024, each in [-1000, 1000]."""
    seed: int | None = None
    """Of the noise, from 0 to 2**64 - 1. Default 0."""
    max_new_tokens: int | None = None
    """Most tokens to generate. Default: until the slot is full."""
    min_new_tokens: int | None = None
    """No end of sequence and no stop id before so many tokens; stop strings end it nevertheless. Default 0."""
    rule: AcceptanceRule | None = None
    """Default: coupled."""
    stop: Sequence[str] = ()
    """Texts that end the generation, at most 16 of 1 to 256 characters. The output ends before the one found."""
    stop_token_ids: Sequence[int] = ()
    """Ids that end it, besides the model's own ends of sequence; at most 64."""
    ignore_eos: bool = False
    """Go on behind the model's own ends of sequence."""
    logprobs: int | None = None
    """Report log probabilities, of so many of the most probable tokens too: 0 to 20. None, the default: none."""
