"""Whether a draft may propose for a target: both must mean the same by every token id."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass

from specpair.errors import DeadlineError, DraftMismatchError, SpecpairError, UnavailableError
from specpair.messages import Fingerprint, ModelInfo, Phase
from specpair.transports import CLOSED, DraftTransport, TargetTransport

__all__ = ["Agreement", "Pairing", "compare"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """What was found out about a pair."""

    vocabulary_size: int | None = None
    refusal: str = ""
    """Why the draft cannot be used now; "" if it can."""
    mismatch: DraftMismatchError | None = None
    """Set if it can never be used with this target."""


class Pairing:
    """One target and one draft, compared when they are first used together, and when the draft was lost and is back.

    The answer is kept as long as both services were ready to give it, and as `fits` says of whoever begins a turn.
    """

    def __init__(self, target: TargetTransport, draft: DraftTransport, *, within: float) -> None:
        self._target = target
        self.draft = draft
        self._within = within
        self._known: ModelInfo | None = None
        self._kept: Agreement | None = None
        self._fitted = False
        self._asking: asyncio.Task[Agreement] | None = None

    @property
    def mismatch(self) -> DraftMismatchError | None:
        """Why the draft can never be used with the target; None also for one in the place of another that could."""
        return self._kept.mismatch if self._kept is not None and not self._fitted else None

    async def check(self) -> Agreement:
        """Asks both services unless the answer is known. Raises what the target raises; a draft's failure is data.

        Whoever comes while they are asked waits for the same answer.
        """
        if self._kept is not None:
            return self._kept
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(None))
            self._asking.add_done_callback(self._asked)
        try:
            return await asyncio.shield(self._asking)
        except SpecpairError as failed:
            # One for each who waits: a failure says whose it is.
            raise copy.copy(failed) from failed.__cause__

    def fits(self, fingerprint: Fingerprint) -> None:
        """Raises DraftMismatchError if who answers at the draft's address is not one that fits the target, any more."""
        if self._known is not None and self._known.fingerprint is not None:
            compare(self._known.fingerprint, fingerprint)

    async def renew(self) -> Agreement:
        """Asks the draft again, and the target if it has not said yet what it runs. Raises as `check`."""
        return await self._ask(self._known)

    def _asked(self, asking: asyncio.Task[Agreement]) -> None:
        self._asking = None
        if not asking.cancelled():
            asking.exception()  # those who wait raise it; there may be none left

    async def _ask(self, known: ModelInfo | None) -> Agreement:
        target, draft = await asyncio.gather(
            self._target.info(self._within) if known is None else _at_once(known),
            self.draft.info(self._within),
            return_exceptions=True,
        )
        if isinstance(target, DeadlineError):
            # The time was this question's own, not the caller's.
            raise UnavailableError(f"the target did not answer within {self._within:g} s")
        if isinstance(target, BaseException):
            raise target
        self._known = target if target.fingerprint is not None else None
        size = target.fingerprint.vocabulary_size if target.fingerprint else None
        if isinstance(draft, SpecpairError) and draft.reason != CLOSED:
            return Agreement(size, refusal=f"draft unreachable: {draft.message}")
        if isinstance(draft, BaseException):
            raise draft
        if draft.phase is not Phase.READY:
            return Agreement(size, refusal=f"draft not ready: {draft.phase} {draft.detail}".rstrip())
        return self._judge(target, draft, size)

    def _judge(self, target: ModelInfo, draft: ModelInfo, size: int | None) -> Agreement:
        if target.fingerprint is None:
            raise UnavailableError(f"the target is {target.phase}")
        mismatch = None
        try:
            if draft.fingerprint is not None:
                compare(target.fingerprint, draft.fingerprint)
        except DraftMismatchError as found:
            mismatch = found
        self._fitted = self._fitted or mismatch is None
        self._kept = Agreement(size, refusal=f"draft mismatch: {mismatch}" if mismatch else "", mismatch=mismatch)
        return self._kept


async def _at_once(info: ModelInfo) -> ModelInfo:
    return info


def compare(target: Fingerprint, draft: Fingerprint) -> None:
    """Raises DraftMismatchError, naming the field, unless both use the same ids for the same tokens.

    Hashes are compared where both sides know them. The chat template does not matter: only the target renders chats.
    """
    for field in ("vocabulary_size", "vocabulary_sha256", "special_tokens_sha256"):
        ours, theirs = getattr(target, field), getattr(draft, field)
        if ours and theirs and ours != theirs:
            raise _mismatch(field, theirs, ours)
    if set(target.eos_token_ids) != set(draft.eos_token_ids):
        raise _mismatch("eos_token_ids", list(draft.eos_token_ids), list(target.eos_token_ids))


def _mismatch(field: str, draft: object, target: object) -> DraftMismatchError:
    return DraftMismatchError(f"the draft has {draft}, the target {target}", field=f"draft.fingerprint.{field}")
