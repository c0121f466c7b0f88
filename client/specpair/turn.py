"""One turn of a session: what was asked for, and what is known of it so far."""

from __future__ import annotations

from specpair.errors import ProtocolError
from specpair.loop import Loop
from specpair.messages import Started
from specpair.meter import Meter
from specpair.params import Prediction, Prompt, SamplingParams
from specpair.request import RequestContext
from specpair.results import Result, Stats, Token

__all__ = ["Turn"]


class Turn:
    """A prompt and what has come of it; its clock starts with its making.

    `prediction` is text or token ids that the caller expects as the output, or None. `request` is how logs and traces
    know it.
    """

    def __init__(
        self,
        prompt: Prompt,
        params: SamplingParams,
        prediction: Prediction | None = None,
        request: RequestContext | None = None,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.prediction = prediction
        self.request = request or RequestContext()
        self.meter = Meter()
        self.loop: Loop | None = None

    def begin(self, started: object, *, vocabulary_size: int | None = None, last: Loop | None = None) -> Loop:
        """The turn's loop, given the target's first message and the loop of the session's last turn.

        Raises ProtocolError if the message is another one or contradicts the last turn.
        """
        if not isinstance(started, Started):
            raise ProtocolError("the target's first message is not `started`")
        self.meter.cached_tokens = started.cached_tokens
        self.loop = Loop(started, self.params, vocabulary_size=vocabulary_size, last=last)
        return self.loop

    @property
    def ended(self) -> bool:
        """Whether it has reached its end."""
        return self.loop is not None and self.loop.finish_reason is not None

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The output so far."""
        return tuple(self.loop.tokens) if self.loop else ()

    @property
    def stats(self) -> Stats:
        """Statistics so far."""
        return self.meter.stats(self.loop)

    @property
    def result(self) -> Result | None:
        """The result; None as long as the turn has not reached its end."""
        loop = self.loop
        if loop is None or loop.finish_reason is None:
            return None
        return Result(
            text="".join(token.text for token in loop.tokens),
            tokens=tuple(loop.tokens),
            prompt_token_ids=tuple(loop.token_ids[: loop.prompt_length]),
            finish_reason=loop.finish_reason,
            stats=self.stats,
            stop_string=loop.stop_string,
            request_id=self.request.id,
        )
