"""Driving a draft turn by turn in this thread, without an engine of its own."""

from __future__ import annotations

from specpair.errors import SpecpairError
from specpair_draft.asks import Ask
from specpair_draft.lockstep import Lockstep
from specpair_draft.sessions import Session
from specpair_draft.steps import Decoder


class Answers(list):
    """Takes what is delivered; `timed` are the proposals, in order. An error is raised as soon as one looks at them."""

    def __call__(self, answer):
        self.append(answer)

    @property
    def timed(self):
        for answer in self:
            if isinstance(answer, SpecpairError):
                raise answer
        return list(self)

    @property
    def token_ids(self):
        return [timed.proposal.token_ids for timed in self.timed]


class Company:
    """Sessions that share a lockstep, numbered by their slots."""

    def __init__(self, runner, *, chunk=32, run_ahead=False, stop_ids=()):
        self.runner = runner
        self.interrupted = False
        self.lockstep = Lockstep(Decoder(runner), prefill_chunk=chunk, interrupted=lambda: self.interrupted)
        self.sessions = {}
        self._options = {"run_ahead": run_ahead, "stop_ids": stop_ids}

    def begin(self, slot, turn):
        if slot not in self.sessions:
            self.sessions[slot] = Session(slot, self.runner.max_length, **self._options)
        self.lockstep.begin(self.sessions[slot], turn)

    def ask(self, slot, ask):
        """Asks and returns where the answers go."""
        answers = Answers()
        self.lockstep.take(self.sessions[slot], ask, answers, 0)
        return answers

    def close(self, slot):
        session = self.sessions.pop(slot)
        session.closed = True
        self.lockstep.close(session)

    def idle(self):
        """Computes until nothing is left to do."""
        while self.lockstep.turn():
            pass

    def until(self, answers, count=1):
        """Computes until so many answers are there."""
        while len(answers) < count:
            assert self.lockstep.turn()
        return answers


class Alone:
    """One session by itself, asked as a function is called."""

    def __init__(self, runner, slot=0, chunk=32, *, run_ahead=False, stop_ids=()):
        self.tokens = []
        self._slot = slot
        self._replaced = 0
        self._company = Company(runner, chunk=chunk, run_ahead=run_ahead, stop_ids=stop_ids)

    @property
    def length(self):
        return len(self.tokens)

    def begin(self, turn):
        self._company.begin(self._slot, turn)
        self.tokens = list(turn.token_ids)
        self._replaced = self.length

    def follow(self, from_position, ids):
        """The next ask tells what became of these tokens."""
        self.tokens[from_position:] = ids
        self._replaced = min(self._replaced, from_position)

    def propose_all(self, max_tokens, **options):
        """Every proposal of one ask; afterwards the session has run ahead as far as it does."""
        ask = Ask(self._replaced, self.tokens[self._replaced :], max_tokens, **options)
        answers = self._company.ask(self._slot, ask)
        self._replaced = self.length
        self._company.until(answers, ask.proposals)
        self._company.idle()
        return [timed.proposal for timed in answers.timed]

    def propose(self, max_tokens, **options):
        return self.propose_all(max_tokens, **options)[0]
