"""Where a service stands between start and stop, as ModelInfo reports it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from specpair.v1 import common_pb2

_LAST_PHASES = frozenset({common_pb2.PHASE_DRAINING, common_pb2.PHASE_FAILED})


@dataclass(frozen=True)
class StatusSnapshot:
    """One consistent view of a service's status.

    `progress` runs from 0 to 1 within the phase; `detail` is one line for people.
    """

    phase: common_pb2.Phase.ValueType
    progress: float
    detail: str

    @property
    def phase_name(self) -> str:
        """The phase in words, for example "warming up"."""
        return common_pb2.Phase.Name(self.phase).removeprefix("PHASE_").replace("_", " ").lower()


class ServiceStatus:
    """Holds phase, progress and detail; every method may be called from any thread.

    A service starts LOADING. DRAINING and FAILED are final: what a loader still reports afterwards is ignored, so that
    it cannot call a stopping service ready.
    """

    def __init__(self) -> None:
        # Listeners are called under the lock, so that all of them see the changes in one order. It is reentrant
        # because a listener may read the status.
        self._lock = threading.RLock()
        self._snapshot = StatusSnapshot(common_pb2.PHASE_LOADING, 0.0, "")
        self._listeners: list[Callable[[StatusSnapshot], None]] = []

    @property
    def snapshot(self) -> StatusSnapshot:
        """Phase, progress and detail as they are now."""
        with self._lock:
            return self._snapshot

    @property
    def phase(self) -> common_pb2.Phase.ValueType:
        """The phase as it is now."""
        return self.snapshot.phase

    def set(self, phase: common_pb2.Phase.ValueType, progress: float = 0.0, detail: str = "") -> None:
        """Enters a phase."""
        self._change(StatusSnapshot(phase, _clamp(progress), detail))

    def advance(self, progress: float) -> None:
        """Moves on within the phase, to a progress from 0 to 1."""
        with self._lock:
            self._change(StatusSnapshot(self._snapshot.phase, _clamp(progress), self._snapshot.detail))

    def fail(self, reason: str) -> None:
        """Enters FAILED: a service that runs under `serve` stops and exits with status 1."""
        self.set(common_pb2.PHASE_FAILED, detail=reason)

    def fill(self, info: common_pb2.ModelInfo) -> None:
        """Writes phase, progress and detail into a ModelInfo."""
        now = self.snapshot
        info.phase, info.progress, info.detail = now.phase, now.progress, now.detail

    def listen(self, listener: Callable[[StatusSnapshot], None]) -> Callable[[], None]:
        """Calls `listener` now and after every change, in the thread that made it; returns a function that ends this.

        A listener must be quick: changes wait for it.
        """
        with self._lock:
            self._listeners.append(listener)
            listener(self._snapshot)

        def forget() -> None:
            with self._lock:
                self._listeners.remove(listener)

        return forget

    def _change(self, snapshot: StatusSnapshot) -> None:
        with self._lock:
            if self._snapshot.phase in _LAST_PHASES or snapshot == self._snapshot:
                return
            self._snapshot = snapshot
            for listener in self._listeners:
                listener(snapshot)


def _clamp(progress: float) -> float:
    return min(1.0, max(0.0, progress))
