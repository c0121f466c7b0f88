"""Draft services in this process that say whatever they are told to: nothing, lies, nonsense, or the truth.

A behaviour is a generator function `(session, ask)` of what a session sends for one ask.
"""

from __future__ import annotations

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc

from specpair.v1 import common_pb2, draft_pb2, draft_pb2_grpc


class Session:
    """What a fake draft knows of one session: its tokens, and a source of chance that its prompt determines."""

    def __init__(self, start, context, stopping):
        self.prompt = tuple(start.token_ids[: start.prompt_length or None])
        self.log = list(start.token_ids)
        self.rng = random.Random(str(self.prompt[-8:]))
        self.asks = 0
        self.context = context
        self._stopping = stopping

    def hang(self):
        """Returns when the call has ended."""
        ended = threading.Event()
        if self.context.add_callback(ended.set):
            while not (ended.wait(0.05) or self._stopping.is_set()):
                pass


class FakeDraft(draft_pb2_grpc.DraftServiceServicer):
    """A draft service with a behaviour. `fingerprint` None: it has no vocabulary to compare."""

    def __init__(self, behaviour, *, fingerprint=None, listen="127.0.0.1:0"):
        self.behaviour = behaviour
        self.fingerprint = fingerprint
        self.sessions = 0
        self._stopping = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=32), options=[("grpc.so_reuseport", 0)])
        draft_pb2_grpc.add_DraftServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(listen)}"
        self._server.start()

    def GetModelInfo(self, request, context):
        info = common_pb2.ModelInfo(phase=common_pb2.PHASE_READY, proposers=[common_pb2.SOURCE_MODEL])
        if self.fingerprint is not None:
            info.fingerprint.CopyFrom(self.fingerprint)
        return draft_pb2.DraftServiceGetModelInfoResponse(info=info)

    def Propose(self, requests, context):
        self.sessions += 1
        session = None
        for request in requests:
            if session is None:
                session = Session(request.start, context, self._stopping)
                yield draft_pb2.ProposeResponse(started=draft_pb2.ProposeStarted(proposer=common_pb2.SOURCE_MODEL))
            else:
                session.log[request.ask.from_position :] = request.ask.token_ids
                session.asks += 1
                yield from self._answers(session, request.ask)

    def _answers(self, session, ask):
        """As many proposals as were asked for, each behind the one before it."""
        end = len(session.log)
        for index in range(max(ask.proposals, 1)):
            for answer in self.behaviour(session, ask):
                if answer.HasField("proposal"):
                    answer.proposal.index = index
                    session.log += answer.proposal.token_ids
                yield answer
        del session.log[end:]

    def stop(self):
        """Ends every call at once."""
        self._stopping.set()
        self._server.stop(None).wait()


@contextlib.contextmanager
def serving(behaviour, **options):
    """A fake draft inside a `with` block."""
    fake = FakeDraft(behaviour, **options)
    try:
        yield fake
    finally:
        fake.stop()


def proposal(session, ask, ids, **changes):
    """An answer of the right form, but for the changes."""
    fields = {"round": ask.round, "base_length": len(session.log), "token_ids": ids, "source": common_pb2.SOURCE_MODEL}
    return draft_pb2.ProposeResponse(proposal=draft_pb2.Proposal(**{**fields, **changes}))


def prophet(outputs):
    """Proposes exactly what the target will say; `outputs` maps a prompt's ids to its output's ids."""

    def behaviour(session, ask):
        told = (session.prompt + tuple(outputs[session.prompt]))[len(session.log) :]
        yield proposal(session, ask, told[: ask.max_tokens])

    return behaviour


def half_true(outputs):
    """Proposes the truth with a wrong id at a random place."""

    def behaviour(session, ask):
        told = list((session.prompt + tuple(outputs[session.prompt]))[len(session.log) :][: ask.max_tokens])
        if told:
            told[session.rng.randrange(len(told))] ^= 1
        yield proposal(session, ask, told)

    return behaviour


def hanging(session, ask):
    """Never answers from the third ask on."""
    if session.asks > 2:
        session.hang()
        return
    yield proposal(session, ask, session.log[-ask.max_tokens :])


def mute(session, ask):
    """Never answers."""
    session.hang()
    yield from ()


def _lies(session, ask, vocabulary):
    rng = session.rng
    count = rng.choice([0, 1, ask.max_tokens, ask.max_tokens + 1, 100])
    anything = [
        lambda: rng.randrange(vocabulary),
        lambda: rng.choice(session.log),
        lambda: rng.choice([vocabulary, vocabulary + 1, 2**31, 2**32 - 1]),
    ]
    # Mostly ids that exist, so that some of the lies reach the target.
    return [rng.choices(anything, [8, 8, 1])[0]() for _ in range(count)]


def liar(vocabulary):
    """Proposes at random: ids from inside and outside the vocabulary, too many of them, none. In the end it breaks."""

    def behaviour(session, ask):
        ids = _lies(session, ask, vocabulary)
        if session.asks < 4 + len(session.prompt) % 9:
            yield proposal(session, ask, ids)
            return
        match len(session.prompt) % 6:
            case 0:
                yield proposal(session, ask, ids, round=ask.round + 1)
            case 1:
                yield proposal(session, ask, ids, base_length=len(session.log) + 1)
            case 2:
                yield draft_pb2.ProposeResponse()
            case 3:
                yield draft_pb2.ProposeResponse(started=draft_pb2.ProposeStarted())
            case 4:
                session.context.abort(grpc.StatusCode.INTERNAL, "the draft broke")
            case 5:
                session.context.cancel()

    return behaviour
