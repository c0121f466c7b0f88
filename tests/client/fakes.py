"""In-memory services: a target that keeps the law of Verify over a small model, and drafts of all kinds."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from specpair.backoff import Timing
from specpair.errors import InvalidRequestError, UnavailableError
from specpair.messages import (
    Block,
    Committed,
    DraftAsk,
    DraftStart,
    DraftStarted,
    Explain,
    Extend,
    Fingerprint,
    ModelInfo,
    Phase,
    Proposal,
    Start,
    Started,
    Verdict,
)
from specpair.params import SamplingParams
from specpair.results import FinishReason, Logprobs, PositionExplanation, Source

VOCABULARY = 50
EOS = 0
FINGERPRINT = Fingerprint(VOCABULARY, "aa", "bb", (EOS,))


def next_token(token_ids: Sequence[int], seed: int = 0) -> int:
    """The model: a token that depends on the last two and falls into loops, as prompt lookup likes."""
    last, before = token_ids[-1], token_ids[-2] if len(token_ids) > 1 else 1
    return (last * last + 3 * before + seed) % 7 + 1


def continuation(token_ids: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """What the model says next, and next, and next."""
    log = list(token_ids)
    for _ in range(count):
        log.append(next_token(log, seed))
    return log[len(token_ids) :]


def text_of(token_id: int) -> str:
    return f"<{token_id}>"


def tokenized(prompt: object) -> list[int]:
    """Token ids of a prompt. The text of an answer is tokenized to other ids than those that it was generated with."""
    if isinstance(prompt, str):
        return [ord(character) % VOCABULARY for character in prompt]
    parts = list(prompt)
    if parts and isinstance(parts[0], dict):
        return tokenized("".join(f"{part['role']}:{part['content']};" for part in parts))
    return parts


@dataclass
class FakeTime:
    """Time that passes while somebody waits, and not otherwise; without jitter. If `real`, so does the loop's time."""

    now: float = 0.0
    waits: list[float] = field(default_factory=list)
    real: bool = False

    @property
    def timing(self) -> Timing:
        return Timing(lambda: self.now, self._wait, lambda: 0.5)

    async def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        await asyncio.sleep(seconds if self.real else 0.0)


@dataclass
class Target:
    """A session at the target: the tokens so far, judged as the proto files say."""

    log: list[int]
    params: SamplingParams
    max_length: int = 1024
    generated: int = 0
    held: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    answer: str = ""
    ended: bool = False

    @classmethod
    def of(cls, prompt: object, params: SamplingParams, max_length: int = 1024) -> Target:
        """A new session."""
        messages = list(prompt) if prompt and isinstance(prompt[0], dict) else []
        return cls(tokenized(prompt), params, max_length, messages=messages)

    def replay(self, committed: Sequence[int]) -> None:
        """Tokens that a session which broke off had committed in this turn."""
        for token_id in committed:
            assert not self.ended, "committed tokens that end the turn"
            self.commit(token_id)

    def extend(self, prompt: object, params: SamplingParams) -> int:
        """The next turn; how many tokens stay in the cache, which holds all but the last one."""
        before = self.log
        if not prompt:
            raise InvalidRequestError("must not be empty", field="extend.prompt")
        if isinstance(prompt[0], dict):
            self.messages += [{"role": "assistant", "content": self.answer}, *prompt]
            self.log = tokenized(self.messages)
        else:
            self.log = [*before, *tokenized(prompt)]
        self.params, self.generated, self.held, self.answer, self.ended = params, 0, "", "", False
        pairs = zip(before[:-1], self.log[:-1], strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

    def judge(self, block: Block) -> Verdict:
        length = len(self.log)
        if self.ended or block.base_length != length or block.last_token_id not in (None, self.log[-1]):
            return Verdict(block.round, True, length, 0, Committed((), "", ()))
        committed, accepted = [], 0
        for proposed in (*block.token_ids, None):
            choice = next_token(self.log, self.params.seed or 0)
            committed.append(self.commit(choice))
            accepted += choice == proposed
            if committed[-1][2] or choice != proposed:
                break
        ids, texts, finishes = zip(*committed, strict=True)
        return Verdict(
            round=block.round,
            stale=False,
            base_length=length,
            accepted=accepted,
            committed=Committed(ids, "".join(texts), tuple(map(len, texts)), self.logprobs(ids), finishes[-1]),
            queue_us=10,
            forward_us=100,
        )

    def logprobs(self, ids: Sequence[int]) -> tuple[Logprobs, ...]:
        """What is reported of tokens, if anything is."""
        return tuple(Logprobs(-float(id_)) for id_ in ids) if self.params.logprobs is not None else ()

    def commit(self, token_id: int) -> tuple[int, str, FinishReason | None]:
        self.log.append(token_id)
        self.generated += 1
        finish = None
        if token_id == EOS or token_id in self.params.stop_token_ids:
            finish = FinishReason.STOP_TOKEN
        elif self.generated == self.params.max_new_tokens:
            finish = FinishReason.MAX_NEW_TOKENS
        elif len(self.log) >= self.max_length:
            finish = FinishReason.CACHE_FULL
        self.ended = finish is not None
        self.held += text_of(token_id)
        if token_id % 5 == 0 and finish is None:  # as half a character would be
            return token_id, "", finish
        text, self.held = self.held, ""
        self.answer += text
        return token_id, text, finish


def unrolled(message: object) -> list[object]:
    """A block with further steps as the blocks that it stands for."""
    if not isinstance(message, Block) or not message.more_steps:
        return [message]
    assert not message.token_ids
    first = replace(message, more_steps=0)
    lengths = range(1, 1 + message.more_steps)
    return [first, *(Block(first.round + i, first.base_length + i, None, (), first.source) for i in lengths)]


@dataclass
class FakeStream:
    """Both ends of a stream: answers come from a function of the request, after `delay` seconds."""

    answer: Callable[[object], object]
    answers: deque[object] = field(default_factory=deque)
    delay: float = 0.0
    cancelled: bool = False
    finished: bool = False
    interrupt: Callable[[], Exception | None] = lambda: None
    broken: Exception | None = None

    async def send(self, message: object) -> None:
        if self.broken is not None:
            raise self.broken
        self.answers.extend(self.answer(one) for one in unrolled(message))

    async def receive(self) -> object:
        await asyncio.sleep(self.delay)
        if self.broken is not None or (self.answers and (failure := self.interrupt()) is not None):
            self.broken = self.broken or failure
            raise self.broken
        if not self.answers:
            await asyncio.Event().wait()  # for ever: whoever answers does so before
        answer = self.answers.popleft()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def finish(self) -> None:
        self.finished = True

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakeTarget:
    """A target service. `falsify` may replace a verdict, `falsify_started` the start of a later turn; `fails_after`
    rounds every stream breaks. In place of the messages that `breaks` names, counted from 0 over all streams, the
    stream breaks with that error. `runs` is what
    ModelInfo says besides, and the stream as far as it says it."""

    fingerprint: Fingerprint | None = FINGERPRINT
    phase: Phase = Phase.READY
    width: int = 8
    max_length: int = 1024
    delay: float = 0.0
    falsify: Callable[[Verdict], object] = lambda verdict: verdict
    fails_after: int | None = None
    failure: Exception | None = None
    falsify_started: Callable[[Started], object] = lambda started: started
    streams: list[FakeStream] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    questions: list[Explain] = field(default_factory=list)
    infos: int = 0
    breaks: dict[int, Exception] = field(default_factory=dict)
    messages: int = 0
    runs: dict[str, object] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)

    def _interrupt(self) -> Exception | None:
        self.messages += 1
        return self.breaks.get(self.messages - 1)

    async def info(self, within: float | None = None) -> ModelInfo:
        self.infos += 1
        if self.failure is not None:
            raise self.failure
        info = ModelInfo("target", self.phase, fingerprint=self.fingerprint, verify_width=self.width)
        return replace(info, **self.runs)

    def _open(self, start: Start) -> tuple[Target, Started]:
        if self.failure is not None:
            raise self.failure
        target = Target.of(start.prompt, start.params, self.max_length)
        if not target.log:
            raise InvalidRequestError("must not be empty", field="start.prompt")
        self.starts.append(start)
        started = self._started(target, 0)
        target.replay(start.committed_token_ids)
        return target, replace(started, length=len(target.log))

    def _started(self, target: Target, kept: int) -> Started:
        shape = (len(target.log), self.width - 1, self.max_length)
        return Started("s1", tuple(target.log[kept:]), kept, *shape, str(self.runs.get("identity", "")))

    async def verify(self, start: Start, within: float | None = None) -> FakeStream:
        target, started = self._open(start)

        def judge(block: Block | Extend) -> object:
            if isinstance(block, Extend):
                try:
                    kept = target.extend(block.prompt, block.params)
                except InvalidRequestError as refused:
                    return refused
                return self.falsify_started(self._started(target, kept))
            assert len(block.token_ids) < self.width
            self.blocks.append(block)
            if self.fails_after is not None and len(self.blocks) > self.fails_after:
                return UnavailableError("the connection broke")
            return self.falsify(target.judge(block))

        self.streams.append(FakeStream(judge, deque([started]), self.delay, interrupt=self._interrupt))
        return self.streams[-1]

    async def generate(self, start: Start, within: float | None = None) -> FakeStream:
        target, started = self._open(start)
        answers: deque[object] = deque([started])
        finish = None
        while finish is None:
            token_id, text, finish = target.commit(next_token(target.log, start.params.seed or 0))
            answers.append(Committed((token_id,), text, (len(text),), target.logprobs([token_id]), finish))
        self.streams.append(FakeStream(lambda _: None, answers, self.delay, interrupt=self._interrupt))
        return self.streams[-1]

    async def tokenize(
        self, prompt: object, within: float | None = None, *, continuation: bool = False
    ) -> tuple[int, ...]:
        return tuple(tokenized(prompt))

    async def explain(self, question: Explain, within: float | None = None) -> tuple[PositionExplanation, ...]:
        self.questions.append(question)
        log = tokenized(question.prompt)
        return tuple(explanations(log, question.token_ids, question.params.seed or 0))

    async def detokenize(self, token_ids: tuple[int, ...], keep: bool, within: float | None = None) -> str:
        return "".join(map(text_of, token_ids))

    async def healthy(self, within: float | None = None) -> bool:
        return self.phase is Phase.READY

    async def close(self) -> None:
        pass


def explanations(log: list[int], proposal: Sequence[int], seed: int = 0) -> list[PositionExplanation]:
    """Every position of a proposal and the place behind it."""
    found, accepted = [], True
    for row, proposed in enumerate((*proposal, None)):
        choice = next_token([*log, *proposal[:row]], seed)
        accepted = accepted and choice == proposed
        reason = "accepted" if accepted else "rejected" if proposed is not None else "nothing was proposed here"
        found.append(PositionExplanation(len(log) + row, proposed, choice, 0.75, None, 0.5, accepted, reason))
    return found


def perfect(draft: FakeDraft, ask: DraftAsk) -> Proposal:
    """Proposes what the target will say."""
    ids = continuation(draft.log, ask.max_tokens, draft.seed)
    return Proposal(ask.round, len(draft.log), tuple(ids), Source.MODEL, draft_us=50)


def liar(draft: FakeDraft, ask: DraftAsk) -> Proposal:
    """Says anything, sometimes the truth, sometimes ids that no vocabulary has, sometimes more than asked."""
    rng = random.Random(f"{draft.seed} {ask.round}")
    truth = continuation(draft.log, 20, draft.seed)
    count = rng.randrange(0, 20)
    ids = [rng.choice([truth[i], truth[i], rng.randrange(2 * VOCABULARY), 2**32 - 1]) for i in range(count)]
    return Proposal(ask.round, len(draft.log), tuple(ids), Source.MODEL)


def wrong_round(draft: FakeDraft, ask: DraftAsk) -> object:
    """Answers a round that nobody asked for, from the third on."""
    proposal = perfect(draft, ask)
    return replace(proposal, round=ask.round + 1) if ask.round > 2 else proposal


def wrong_base(draft: FakeDraft, ask: DraftAsk) -> object:
    """Continues another text, from the third round on."""
    proposal = perfect(draft, ask)
    return replace(proposal, base_length=len(draft.log) - 1) if ask.round > 2 else proposal


def starting_again(draft: FakeDraft, ask: DraftAsk) -> object:
    """Starts in the middle."""
    return DraftStarted(Source.MODEL, 0) if ask.round > 2 else perfect(draft, ask)


def hanging(draft: FakeDraft, ask: DraftAsk) -> object:
    """Never answers, from the third round on."""
    return None if ask.round > 2 else perfect(draft, ask)


def dying(draft: FakeDraft, ask: DraftAsk) -> object:
    """Breaks in the third round."""
    return UnavailableError("the connection broke") if ask.round > 2 else perfect(draft, ask)


@dataclass
class FakeDraft:
    """A draft service that answers asks with one of the functions above, and checks that the asks make sense."""

    behaviour: Callable[[FakeDraft, DraftAsk], object] = perfect
    fingerprint: Fingerprint | None = FINGERPRINT
    phase: Phase = Phase.READY
    unreachable: Exception | None = None
    refuses: Exception | None = None
    delay: float = 0.0
    seed: int = 0
    log: list[int] = field(default_factory=list)
    starts: list[DraftStart] = field(default_factory=list)
    asks: list[DraftAsk] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)

    async def info(self, within: float | None = None) -> ModelInfo:
        if self.unreachable is not None:
            raise self.unreachable
        return ModelInfo("draft", self.phase, fingerprint=self.fingerprint)

    async def propose(self, start: DraftStart, within: float | None = None) -> FakeStream:
        if self.refuses is not None:
            raise self.refuses
        stream = FakeStream(lambda ask: None, deque(), self.delay)

        def begin(start: DraftStart) -> None:
            self.starts.append(start)
            self.log = list(start.token_ids)
            self.seed = start.params.seed or 0
            stream.answers.append(DraftStarted(Source.MODEL, 0))

        async def send(ask: DraftAsk | DraftStart) -> None:
            if isinstance(ask, DraftStart):
                begin(ask)
                return
            assert len(self.starts[-1].token_ids) <= ask.from_position <= len(self.log)
            assert ask.max_tokens > 0
            self.asks.append(ask)
            self.log[ask.from_position :] = told = list(ask.token_ids)
            end = ask.from_position + len(told)
            for index in range(ask.proposals):
                answer = self.behaviour(self, ask)
                if answer is None:
                    break
                if isinstance(answer, Proposal):
                    answer = replace(answer, index=index)
                    self.log += answer.token_ids
                stream.answers.append(answer)
            del self.log[end:]  # what was proposed is not the session's yet

        begin(start)
        stream.send = send
        self.streams.append(stream)
        return stream

    async def healthy(self, within: float | None = None) -> bool:
        return self.unreachable is None

    async def close(self) -> None:
        pass
