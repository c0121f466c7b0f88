"""Decoding sessions in lockstep: one batch of neighbouring slots, one id a session and step.

What a step needs is laid out when a run is: the guesses of one step are the rows of the next one and stay on the
device, and everything is read back at once when the run is over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specpair_draft.guessing import Guess, guess
from specpair_draft.sessions import Session
from specpair_runtime.models.runner import ModelRunner
from specpair_runtime.sampling.params import GREEDY, SamplingBatch, SamplingParams
from specpair_runtime.sampling.rejection import SparseProbs, sparse

__all__ = ["CATCH_UP", "STEP_WIDTHS", "Decoder", "Run"]

# Rows of a draft step: one, or up to so many to catch up with what the target committed.
CATCH_UP = 8
STEP_WIDTHS = (1, CATCH_UP)


class Decoder:
    """Lays out runs over one model's slots."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self._params: Sequence[SamplingParams] = ()
        self._batch = SamplingBatch.of((), runner.device)

    def run(self, sessions: Sequence[Session]) -> Run:
        """A run of sessions that lack at most `CATCH_UP` ids."""
        return Run(self, sessions)

    def batch(self, params: Sequence[SamplingParams]) -> SamplingBatch:
        """Parameters on the device, those of the last run again if they are the same."""
        if params != self._params:
            self._params, self._batch = params, SamplingBatch.of(params, self.runner.device)
        return self._batch


class Run:
    """Some steps of the same sessions. The first one feeds what each session lacks, the others one guess each.

    Sessions change only in `read`. A run that fails, or that nobody reads, has not happened.
    """

    def __init__(self, decoder: Decoder, sessions: Sequence[Session]) -> None:
        self.sessions = sessions
        self._runner = runner = decoder.runner
        slots = runner.slot_range([session.slot for session in sessions])
        self._first_slot = slots.start
        self._rows = [session.slot - slots.start for session in sessions]
        pending = [session.path.pending for session in sessions]
        width = 1 if all(len(ids) == 1 for ids in pending) else CATCH_UP
        rows = [[0] * width for _ in slots]
        starts = [runner.parking] * len(slots)
        counts = [0] * len(slots)
        params = [GREEDY] * len(slots)
        for row, session, ids in zip(self._rows, sessions, pending, strict=True):
            rows[row][: len(ids)] = ids
            starts[row], counts[row] = session.path.fed, len(ids)
            params[row] = session.params
        ahead = [(start, start + count) for start, count in zip(starts, counts, strict=True) if count]
        self._length = runner.bucket(max(start for start, _ in ahead), width)
        room = self._length - max(end for _, end in ahead) + 1
        self.budget = min(room, *(session.wanted for session in sessions))
        """Steps until a session has what it wants, or the attended length is at its end."""
        self.watched = any(session.confident for session in sessions)
        """Whether a proposal may end before: whoever runs this reads after every step then."""

        self._params = decoder.batch(params)
        self._all_rejection = all(session.samples_by_rejection for session in sessions)
        self._ids = torch.tensor(rows)  # [batch, width]
        self._starts = torch.tensor(starts)  # [batch], stays on the host
        self._fed = torch.tensor(counts)  # [batch], ids fed by the next step
        self._last = (self._fed - 1).clamp(min=0).to(runner.device) if width > 1 else None
        # Of the ids to choose, [batch, 1]. Noise and histories alone look at them.
        self._positions = (self._starts + self._fed)[:, None].to(runner.device)
        self._moves = self._params.any_sampled or any(session.params.needs_history for session in sessions)
        self._histories = [
            (row, session.history(runner), torch.tensor(session.path.guesses, dtype=torch.int64).to(runner.device))
            for row, session in zip(self._rows, sessions, strict=True)
            if session.params.needs_history
        ]
        self._guesses: list[Guess] = []
        self._peaks: list[torch.Tensor] = []

    def step(self) -> None:
        """One forward pass and one guess for each session; waits for nothing on the device."""
        logits = self._runner.logits(self._first_slot, self._ids, self._starts, self._length)
        if self._last is not None:
            logits = logits.gather(1, self._last[:, None, None].expand(-1, -1, logits.shape[-1]))
        # [batch, 1, vocabulary] from here on
        self._peaks.append(logits.amax(dim=-1))
        guessed = guess(
            self._with_histories(logits),
            self._positions,
            self._params,
            all_rejection=self._all_rejection,
            confident=self.watched,
        )
        self._guesses.append(guessed)
        self._lay_out_next(guessed.ids)

    def _lay_out_next(self, ids: torch.Tensor) -> None:
        """The guesses are the next rows; slots that only lie between others stay where they are."""
        self._ids = ids
        self._starts = self._starts + self._fed
        if self._last is not None:
            self._fed, self._last = self._fed.clamp(max=1), None
        if self._moves:
            self._positions = self._positions + self._fed[:, None].to(ids.device)
        self._histories = [(row, history, torch.cat([said, ids[row]])) for row, history, said in self._histories]

    def _with_histories(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._histories:
            return logits
        scores = logits.to(torch.float32, copy=True)
        for row, history, said in self._histories:
            scores[row] = history.apply(scores[row], said, self._positions[row])
        return scores

    def read(self) -> list[Session]:
        """Brings the guesses to the sessions, those of a session whose logits were not finite up to there.

        Returns such sessions. The run may go on afterwards with the others' guesses.
        """
        if not self._guesses:
            return []
        guesses, steps = self._guesses, len(self._guesses)
        finite = torch.cat(self._peaks, dim=1).isfinite()
        self._guesses, self._peaks = [], []
        # The one copy from device to host, [batch, 2 * steps]; others only where confidence or probabilities count.
        said = torch.cat([*(one.ids for one in guesses), finite], dim=1).tolist()
        confidence = _confidence(guesses, len(said))
        probs = _probs(guesses, len(said))
        broken = []
        for row, session in zip(self._rows, self.sessions, strict=True):
            count = (*said[row][steps:], 0).index(0)
            if count < steps:
                broken.append(session)
            if count:
                by_rejection = probs[row][:count] if session.samples_by_rejection else ()
                session.path.grow(said[row][:count], confidence[row][:count], by_rejection)
        return broken


def _confidence(guesses: Sequence[Guess], batch: int) -> list[list[float]]:
    """By row and step; without steps where nobody asked."""
    known = [one.confidence for one in guesses if one.confidence is not None]
    confidence: list[list[float]] = torch.cat(known, dim=1).tolist() if known else [[]] * batch
    return confidence


def _probs(guesses: Sequence[Guess], batch: int) -> list[list[SparseProbs]]:
    """By row and step; without steps where no session samples by the rejection rule."""
    drafted = [one.drafted for one in guesses if one.drafted is not None]
    if not drafted:
        return [[]] * batch
    support = torch.stack([one.support for one in drafted], dim=1).tolist()  # [batch, steps, ids]
    probs = torch.stack([one.probs for one in drafted], dim=1).tolist()
    return [[sparse(*place) for place in zip(*row, strict=True)] for row in zip(support, probs, strict=True)]
