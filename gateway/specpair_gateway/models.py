"""What the model is called."""

from __future__ import annotations

import time
from typing import Any

from specpair import InvalidRequestError, SpeculativeClient
from specpair_gateway.problems import MODEL_NOT_FOUND

__all__ = ["ServedModels"]


class ServedModels:
    """The names under which the target's model can be asked for: those given, else the target's own name for it."""

    def __init__(self, client: SpeculativeClient, names: tuple[str, ...]) -> None:
        self._client = client
        self._given = names
        self._known = names
        self._since = int(time.time())

    async def check(self, name: str) -> None:
        """Raises InvalidRequestError with the reason MODEL_NOT_FOUND for another name, and what the client raises."""
        if name not in self._known:  # perhaps the target runs another one by now
            self._known = await self.names()
        if name not in self._known:
            raise InvalidRequestError(f"the model {name!r} does not exist", field="model", reason=MODEL_NOT_FOUND)

    async def names(self) -> tuple[str, ...]:
        """All names, the first one first. Raises what the client raises."""
        if self._given:
            return self._given
        target, _ = await self._client.info()
        return (_public(target.model),)

    def describe(self, name: str) -> dict[str, Any]:
        """OpenAI's object for a model."""
        return {"id": name, "object": "model", "created": self._since, "owned_by": "specpair"}


def _public(model: str) -> str:
    """A hub id as it is; of a directory its last part, since the rest is nobody's business."""
    is_directory = model.startswith(("/", ".", "~")) or model.count("/") > 1
    return model.rstrip("/").rpartition("/")[2] if is_directory else model
