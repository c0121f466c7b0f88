"""What transformers makes of scores before it scales and truncates them, to compare with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from specpair_runtime.sampling.params import SamplingParams


class PresenceAndFrequency:
    """The definition of these penalties, id by id: both count the output, not the prompt."""

    def __init__(self, params: SamplingParams, prompt_length: int) -> None:
        self._params = params
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for token_id, count in Counter(input_ids[0, self._prompt_length :].tolist()).items():
            scores[0, token_id] -= self._params.frequency_penalty * count + self._params.presence_penalty * (count > 0)
        return scores


def reference_penalties(params: SamplingParams, prompt_length: int, suppressed: Collection[int]) -> LogitsProcessorList:
    """The processors that `generate` builds from its options, in its order, and `PresenceAndFrequency` among them."""
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token_id,): bias for token_id, bias in params.logit_bias}))
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(PresenceAndFrequency(params, prompt_length))
    if suppressed and params.min_new_tokens > 0:
        processors.append(MinNewTokensLengthLogitsProcessor(prompt_length, params.min_new_tokens, sorted(suppressed)))
    return processors


def penalties(vocabulary: int) -> st.SearchStrategy[dict[str, object]]:
    """Parameters that need a history, each of them often at its default."""
    bias = st.dictionaries(st.integers(0, vocabulary - 1), st.sampled_from([-1000.0, -3.5, 0.25, 7.0]), max_size=4)
    return st.fixed_dictionaries(
        {
            "repetition_penalty": st.sampled_from([1.0, 0.5, 1.3, 4.0]),
            "presence_penalty": st.sampled_from([0.0, -2.0, 0.6, 2.0]),
            "frequency_penalty": st.sampled_from([0.0, -1.5, 0.3, 2.0]),
            "logit_bias": bias.map(lambda entries: tuple(sorted(entries.items()))),
            "min_new_tokens": st.integers(0, 12),
        }
    )


def truncations() -> st.SearchStrategy[dict[str, object]]:
    """Temperature, greedy included, and what cuts the distribution."""
    return st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.3, 1.0, 8.0]),
            "top_k": st.sampled_from([0, 1, 5, 100]),
            "top_p": st.sampled_from([1.0, 0.9, 0.4, 0.01]),
            "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        }
    )
