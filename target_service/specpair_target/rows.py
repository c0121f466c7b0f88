"""What a session feeds to its next step."""

from __future__ import annotations

from specpair_runtime.sampling.history import TokenHistory
from specpair_target.lanes import Lane
from specpair_target.sessions import Session
from specpair_target.verifier import Row, Verifier

__all__ = ["RowMaker"]


class RowMaker:
    """Makes the rows of steps."""

    def __init__(self, verifier: Verifier) -> None:
        self._runner = verifier.runner
        self._width = verifier.width

    def of(self, lane: Lane, length: int) -> Row:
        """The session's next tokens: proposals to judge, or committed ones to replay.

        Nothing is judged at or behind position `length`, which belongs to the next bucket: every position is judged
        with the attended length of its own bucket, whichever block it comes in. A proposal across that border loses
        its tail.
        """
        session = lane.session
        if not session.caught_up:
            end = min(session.kv_length + self._width, len(session.tokens) - 1, length)
            return Row(session.kv_length, session.tokens[session.kv_length : end])
        block = lane.blocks[0].block
        token_ids = [session.tokens[-1], *block.token_ids][: length - session.kv_length]
        return Row(
            start=session.kv_length,
            token_ids=token_ids,
            params=session.options.sampling,
            history=self._history(session),
            draft_probs=block.draft_probs[: len(token_ids) - 1],
            top_logprobs=session.options.top_logprobs,
            traced=session.options.traced,
        )

    def _history(self, session: Session) -> TokenHistory | None:
        if not session.options.sampling.needs_history:
            return None
        if session.history is None:
            session.history = TokenHistory(
                session.options.sampling,
                session.tokens[: session.prompt_length],
                session.options.stop_token_ids,
                self._runner.vocabulary,
                self._runner.device,
            )
        session.history.extend(session.tokens[session.history.length :])
        return session.history
