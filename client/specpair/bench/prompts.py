"""What the benchmark continues: texts of a file or a few of its own, cut or repeated where a length is asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from specpair.client import SpeculativeClient
from specpair.errors import InvalidRequestError

__all__ = ["TEXTS", "cut", "random_prompts", "read_texts", "tokenized"]

TEXTS = (
    "def read_table(path, separator):\n    rows = []\n    with open(path) as file:\n        for line in file:\n",
    "The harbour was quiet that morning. Two boats had come in before dawn, and on the quay the crates stood",
    "class Queue:\n    def __init__(self, limit):\n        self.limit = limit\n        self.items = []\n\n    def put(",
    "To measure how fast something is, first decide what it is compared with. Then measure both,",
)


def read_texts(path: Path | None, count: int) -> list[str]:
    """The first `count` texts of a JSON list of texts or of objects with a "text"; without a file, built-in ones.

    Raises InvalidRequestError with the field `prompts` if the file has none.
    """
    if path is None:
        return list(TEXTS[:count])
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        texts = [str(entry["text"]) if isinstance(entry, dict) else str(entry) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidRequestError(f"{path} is not a list of prompts: {error}", field="prompts") from None
    if not texts:
        raise InvalidRequestError(f"{path} has no prompts", field="prompts")
    return texts[:count]


async def tokenized(client: SpeculativeClient, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of texts, so that every run is given exactly the same."""
    return [await client.tokenize(text) for text in texts]


def cut(prompts: Sequence[Sequence[int]], length: int) -> list[tuple[int, ...]]:
    """As many prompts of exactly `length` tokens: each is continued with those behind it, around, and cut."""
    found = []
    for start in range(len(prompts)):
        tokens = (token for prompt in cycle((*prompts[start:], *prompts[:start])) for token in prompt)
        found.append(tuple(islice(tokens, length)))
    return found


def random_prompts(vocabulary: int, count: int, length: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Prompts of ids drawn without repetition as far as the vocabulary allows: prompt lookup finds nothing in them.

    The first 8 ids are left out where there are enough others: special tokens tend to stand there.
    """
    ids = range(8, vocabulary) if vocabulary > length + 8 else range(vocabulary)
    draw = random.Random(seed)
    return [
        tuple(draw.sample(ids, length) if len(ids) >= length else draw.choices(ids, k=length)) for _ in range(count)
    ]
