"""What a client's sessions have learned about speed: a new one begins with what the last one knew."""

from __future__ import annotations

from copy import deepcopy

from specpair.depth import Depth
from specpair.pacing import GoodputPacer
from specpair.params import AcceptanceRule, SamplingParams
from specpair.yields import Yields

__all__ = ["Experience", "Knowledge"]


class Knowledge:
    """What one session knows. It learns by itself; `Experience` hands it on."""

    def __init__(self, depth: Depth) -> None:
        self.depth = depth
        self.yields = Yields()
        self._pacers: dict[tuple[bool, bool], GoodputPacer] = {}

    def pacer(self, params: SamplingParams) -> GoodputPacer:
        """The pacer of a draft model, by what its acceptance depends on most."""
        manner = not params.temperature, params.rule == AcceptanceRule.REJECTION
        return self._pacers.setdefault(manner, GoodputPacer())


class Experience:
    """Hands the knowledge of one session to the next ones. Sessions at the same time do not share theirs."""

    def __init__(self, chain: int | None = None) -> None:
        """`chain` is a fixed number of blocks to send ahead of verdicts, None for as many as pay."""
        self._last = Knowledge(Depth(chain))

    def begin(self) -> Knowledge:
        """For a new session."""
        return deepcopy(self._last)

    def keep(self, knowledge: Knowledge) -> None:
        """A session's turn has reached its end."""
        self._last = knowledge
