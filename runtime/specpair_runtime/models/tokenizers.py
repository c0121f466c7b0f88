"""Tokenizers: loading them, and the fingerprint by which a draft and a target recognise each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specpair.errors import ModelLoadError

# What a tokenizer is saved as, one way or another.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

__all__ = ["VocabularyFingerprint", "fingerprint", "load_tokenizer"]


@dataclass(frozen=True)
class VocabularyFingerprint:
    """What must agree between a draft and a target; hashes are SHA-256 in hex, "" when unknown."""

    vocabulary_size: int
    vocabulary_sha256: str
    special_tokens_sha256: str
    eos_token_ids: tuple[int, ...]
    chat_template_sha256: str


def load_tokenizer(model: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model, or None when there is none: the service then speaks token ids only.

    Raises ModelLoadError where a package that it needs is missing.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if any((Path(model) / name).exists() for name in _FILES):
            raise ModelLoadError(f"cannot load the tokenizer of {model!r}: {error}", field="model") from error
        return None
    except ImportError as error:
        raise ModelLoadError(f"cannot load the tokenizer: {error}", field="model") from error
    # Where there are no files, some classes make up a tokenizer that knows its special tokens and nothing else.
    return tokenizer if tokenizer.get_vocab().values() - tokenizer.added_tokens_decoder.keys() else None


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> VocabularyFingerprint:
    """The fingerprint of a model with its tokenizer.

    The vocabulary's size is the tokenizer's, since embedding matrices are padded to round numbers that differ between
    models of one family; without a tokenizer it is the matrix's.
    """
    rows = model.config.get_text_config(decoder=True).vocab_size
    eos = _eos_token_ids(model, tokenizer)
    if tokenizer is None:
        return VocabularyFingerprint(rows, "", "", eos, "")
    vocabulary = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items())
    special = sorted((tokenizer.convert_tokens_to_ids(token), token) for token in set(tokenizer.all_special_tokens))
    template = tokenizer.chat_template
    return VocabularyFingerprint(
        vocabulary_size=min(rows, vocabulary[-1][0] + 1),
        vocabulary_sha256=_sha256(vocabulary),
        special_tokens_sha256=_sha256(special),
        eos_token_ids=eos,
        chat_template_sha256=hashlib.sha256(str(template).encode()).hexdigest() if template else "",
    )


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    # As `generate` does: the generation config decides, which reads the model's config when it has no file.
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    if configured is None and tokenizer is not None:
        configured = tokenizer.eos_token_id
    if configured is None:
        return ()
    ids = {configured} if isinstance(configured, int) else set(configured)
    # Some configs name ids behind the embedding matrix, which can never be chosen.
    return tuple(sorted(id_ for id_ in ids if 0 <= id_ < model.config.get_text_config(decoder=True).vocab_size))


def _sha256(pairs: Iterable[tuple[int, str]]) -> str:
    digest = hashlib.sha256()
    for id_, token in pairs:
        digest.update(f"{id_}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
