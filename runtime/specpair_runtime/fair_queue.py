"""A queue in which every owner gets its turn."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

_Item = TypeVar("_Item")


class FairQueue(Generic[_Item]):
    """Items by owner: one owner's go in order of arrival, and the owners take turns, one item each.

    So an owner of many items delays each of the others by one item a turn, however many it has (round robin, Nagle
    1987, RFC 970).
    """

    def __init__(self) -> None:
        # In order of turns: whose was just served goes to the end.
        self._lines: dict[str, deque[_Item]] = {}

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def count(self, owner: str) -> int:
        """Items of one owner."""
        return len(self._lines.get(owner, ()))

    def ahead(self, owner: str) -> int:
        """Items that would be served before another one of `owner`, if none came or left meanwhile."""
        own = self.count(owner)
        turns = own + 1
        ahead = own
        for other, line in self._lines.items():
            if other == owner:
                # Those behind it have had one turn less when its last one comes.
                turns -= 1
            else:
                ahead += min(len(line), turns)
        return ahead

    def push(self, owner: str, item: _Item) -> None:
        """Takes an item."""
        self._lines.setdefault(owner, deque()).append(item)

    def pop(self) -> _Item:
        """The next item. Raises IndexError when there is none."""
        owner = next(iter(self._lines), None)
        if owner is None:
            raise IndexError("the queue is empty")
        line = self._lines.pop(owner)
        item = line.popleft()
        if line:
            self._lines[owner] = line
        return item

    def remove(self, owner: str, item: _Item) -> None:
        """Takes an item out, if it is there."""
        line = self._lines.get(owner, deque())
        with suppress(ValueError):
            line.remove(item)
        if not line:
            self._lines.pop(owner, None)

    def crowded_by(self, owner: str) -> str | None:
        """Who has so many more items than `owner` that one for the other would be fairer; None if nobody has."""
        greediest = max(self._lines, key=self.count, default=owner)
        return greediest if self.count(greediest) > self.count(owner) + 1 else None

    def pop_newest(self, owner: str) -> _Item:
        """Takes out an owner's newest item. Raises KeyError when it has none."""
        line = self._lines[owner]
        item = line.pop()
        if not line:
            del self._lines[owner]
        return item
