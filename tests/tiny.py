"""Tiny random models and a tiny tokenizer, and prompts for them.

The weights are drawn wide, so that the most probable token changes from step to step and stands clear of the second:
`generate` computes one row at a time, a target several, and the last bits of their logits differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

# Ids that a model without a tokenizer speaks.
VOCABULARY = 211
# Positions that the models know.
POSITIONS = 512
# Least distance between the two best logits that no rounding in fp32 bridges.
CLEAR = 1e-4

_NO_SPECIAL_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.5,
    **_NO_SPECIAL_IDS,
}


def _gpt2() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        initializer_range=0.5,
        **_NO_SPECIAL_IDS,
    )


def _opt() -> OPTConfig:
    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        init_std=0.5,
        **_NO_SPECIAL_IDS,
    )


def _llama(**changes: object) -> LlamaConfig:
    return LlamaConfig(**{**_SIZE, **changes})


# A window that most of the prompts are longer than.
_WINDOW = 24
_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    # Another model for the same tokens: a draft.
    "llama-small": lambda: _llama(hidden_size=16, intermediate_size=24, num_hidden_layers=1),
    # bitsandbytes packs 4-bit weights in blocks of 64.
    "llama-blocks": lambda: _llama(hidden_size=64, intermediate_size=128, num_hidden_layers=1),
    # An embedding matrix with more rows than the tokenizer has ids.
    "llama-text": lambda: _llama(vocab_size=len(tiny_tokenizer()) + 13),
    "mistral": lambda: MistralConfig(**_SIZE, sliding_window=None),
    "mistral-sliding": lambda: MistralConfig(**_SIZE, sliding_window=_WINDOW),
    "qwen3": lambda: Qwen3Config(**_SIZE, head_dim=16),
    # One layer attends to everything, one to a window.
    "qwen3-mixed": lambda: Qwen3Config(
        **_SIZE, head_dim=16, use_sliding_window=True, sliding_window=_WINDOW, max_window_layers=1
    ),
    "gemma": lambda: GemmaConfig(**{**_SIZE, "num_key_value_heads": 1}, head_dim=16),
    "opt": _opt,
    "gpt2": _gpt2,
}
FAMILIES = ["llama", "mistral", "mistral-sliding", "qwen3", "qwen3-mixed", "gemma", "opt", "gpt2"]


class TinyModels:
    """Builds each model once and saves it in a directory of its own below `root`."""

    def __init__(self, root: Path) -> None:
        # Threads would only wait for each other.
        torch.set_num_threads(1)
        self._root = root
        self._references: dict[str, Reference] = {}

    def path(self, name: str) -> str:
        """The directory of a model of `_CONFIGS`; "llama-text" has a tokenizer beside it."""
        path = self._root / name
        if not path.exists():
            torch.manual_seed(23)
            model = AutoModelForCausalLM.from_config(_CONFIGS[name]())
            model.generation_config = GenerationConfig(**_NO_SPECIAL_IDS)
            if name == "llama-text":
                _make_readable(model.get_output_embeddings().weight.data)
                tiny_tokenizer().save_pretrained(path)
            model.save_pretrained(path)
        return str(path)

    def reference(self, name: str) -> Reference:
        """transformers on the same weights."""
        if name not in self._references:
            self._references[name] = Reference(AutoModelForCausalLM.from_pretrained(self.path(name)).eval())
        return self._references[name]


def _make_readable(head: torch.Tensor) -> None:
    """Makes ASCII likelier than halves of other characters, and the padding of the vocabulary likelier than all."""
    tokenizer = tiny_tokenizer()
    unreadable = [id_ for id_ in range(len(tokenizer)) if not tokenizer.decode([id_]).isascii()]
    head[unreadable] *= 0.8
    head[len(tokenizer) :] *= 2


class Reference:
    """`generate` of transformers in fp32."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._known: dict[tuple[int, ...], list[int]] = {}

    def greedy(self, prompt: Sequence[int], count: int, **options: object) -> list[int]:
        """The ids that it adds to a prompt; fails when the choice of one of them was a matter of rounding."""
        key = (*prompt, -count)
        if options or key not in self._known:
            ids = torch.tensor([prompt])
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )
            best = torch.cat(output.logits).topk(2, dim=-1).values
            assert (best[:, 0] - best[:, 1]).min() > CLEAR, "the two best tokens are too close to be told apart"
            added = output.sequences[0, len(prompt) :].tolist()
            if options:
                return added
            self._known[key] = added
        return self._known[key]

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits behind the last of the ids, [vocabulary]."""
        return self.model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]


def random_ids(length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    """A prompt of any length."""
    return random.Random(f"{length} {seed}").choices(range(vocabulary), k=length)


TEXT = "def naïve(x):\n    return 'größe 😀 ✓ 日本語' # STOP here, 1 + 2 == 3 and don't worry\n"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 256 bytes, three special tokens and some merges."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT, TEXT.swapcase(), "stop stop the stopping of the end, STOPPED", "x = [0, 1, 2, 3]\n" * 3],
        trainers.BpeTrainer(
            vocab_size=330,
            min_frequency=1,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: spaces belong to words, the first is left out, rare characters fall into bytes."""
    ids = {
        token: id_ for id_, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    }
    merges = [("s", "t"), ("st", "o"), ("sto", "p"), ("\u2581", "stop"), ("\u2581", "a"), ("d", "e"), ("\u2581", "de")]
    for token in (*"\u2581abcdefghijklmnopqrstuvwxyz():", *(a + b for a, b in merges)):
        ids[token] = len(ids)
    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
