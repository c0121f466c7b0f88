"""The fakes behind real gRPC on the loopback interface."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from grpc_status import rpc_status

from specpair.errors import InvalidRequestError, OverloadedError, SpecpairError, to_status
from specpair.messages import Block, Verdict
from specpair.params import SamplingParams
from specpair.results import Source
from specpair.v1 import common_pb2, draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc

from .fakes import EOS, VOCABULARY, Target, continuation, explanations, next_token, text_of, unrolled

FINGERPRINT = common_pb2.Fingerprint(vocabulary_size=VOCABULARY, vocabulary_sha256="aa", eos_token_ids=[EOS])
FINISH = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    "stop_token": common_pb2.FINISH_REASON_STOP_TOKEN,
    "max_new_tokens": common_pb2.FINISH_REASON_MAX_NEW_TOKENS,
    "cache_full": common_pb2.FINISH_REASON_CACHE_FULL,
}


def fail(context: grpc.ServicerContext, error: SpecpairError) -> None:
    context.abort_with_status(rpc_status.to_status(to_status(error)))


def prompt_ids(prompt: common_pb2.Prompt, context: grpc.ServicerContext) -> list[int]:
    ids = list(prompt.token_ids.ids) or [ord(c) % VOCABULARY for c in prompt.text]
    if not ids:
        fail(context, InvalidRequestError("must not be empty", field="start.prompt"))
    return ids


def turn(message) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=message.sampling.max_new_tokens or None,
        seed=message.sampling.seed,
        stop_token_ids=tuple(message.stop.stop_token_ids),
    )


def verdict_message(verdict: Verdict) -> target_pb2.Verdict:
    """A verdict on the wire."""
    committed = verdict.committed
    return target_pb2.Verdict(
        round=verdict.round,
        status=target_pb2.Verdict.STATUS_STALE if verdict.stale else target_pb2.Verdict.STATUS_APPLIED,
        base_length=verdict.base_length,
        accepted=verdict.accepted,
        committed=common_pb2.CommittedTokens(
            token_ids=committed.token_ids,
            text_delta=committed.text_delta,
            text_lengths=committed.text_lengths,
            finish_reason=FINISH[committed.finish_reason],
        ),
    )


@dataclass
class TargetServicer(target_pb2_grpc.TargetServiceServicer):
    """Answers the prompt "full" as a service without a free slot, and waits `delay` seconds for each verdict."""

    delay: float = 0.0
    ended: Event = field(default_factory=Event)
    cut_after: int | None = None
    starts: list[target_pb2.SessionStart] = field(default_factory=list)
    blocks: list[target_pb2.Block] = field(default_factory=list)

    def GetModelInfo(self, request, context):
        info = common_pb2.ModelInfo(
            model="target", phase=common_pb2.PHASE_READY, fingerprint=FINGERPRINT, verify_width=8, max_length=1024
        )
        return target_pb2.TargetServiceGetModelInfoResponse(info=info)

    def Verify(self, requests, context):
        context.add_callback(self.ended.set)
        start = next(requests).start
        self.starts.append(start)
        if start.prompt.text == "full":
            fail(context, OverloadedError("no slot", reason="KV_SLOTS_EXHAUSTED"))
        ids = prompt_ids(start.prompt, context)
        target = Target(ids, turn(start))
        started = self.started(ids)
        target.replay(start.committed_token_ids)
        started.length = len(target.log)
        yield target_pb2.VerifyResponse(started=started)
        for i, request in enumerate(requests):
            if i == self.cut_after:
                return
            time.sleep(self.delay)
            if request.HasField("extend"):
                kept = target.extend(prompt_ids(request.extend.prompt, context), turn(request.extend))
                yield target_pb2.VerifyResponse(started=self.started(target.log, kept))
                continue
            block = request.block
            self.blocks.append(block)
            last = block.last_token_id if block.HasField("last_token_id") else None
            ids = tuple(block.token_ids)
            received = Block(block.round, block.base_length, last, ids, Source.MODEL, more_steps=block.more_steps)
            for one in unrolled(received):
                yield target_pb2.VerifyResponse(verdict=verdict_message(target.judge(one)))

    def Generate(self, request, context):
        context.add_callback(self.ended.set)
        ids = prompt_ids(request.prompt, context)
        target = Target(ids, turn(request))
        started = self.started(ids)
        target.replay(request.committed_token_ids)
        started.length = len(target.log)
        yield target_pb2.GenerateResponse(started=started)
        finish = None
        while finish is None and context.is_active():
            time.sleep(self.delay)
            token_id, text, finish = target.commit(next_token(target.log, target.params.seed))
            committed = common_pb2.CommittedTokens(
                token_ids=[token_id], text_delta=text, text_lengths=[len(text)], finish_reason=FINISH[finish]
            )
            yield target_pb2.GenerateResponse(committed=committed)

    def Tokenize(self, request, context):
        return target_pb2.TokenizeResponse(token_ids=prompt_ids(request.prompt, context))

    def Detokenize(self, request, context):
        return target_pb2.DetokenizeResponse(text="".join(map(text_of, request.token_ids)))

    def ExplainVerify(self, request, context):
        explained = explanations(prompt_ids(request.prompt, context), request.token_ids, request.sampling.seed)
        sampled_from = [dict(zip(given.token_ids, given.probs, strict=True)) for given in request.draft_probs]
        positions = [
            target_pb2.PositionExplanation(
                position=one.position,
                proposed_token_id=one.proposed_token_id,
                target_token_id=one.target_token_id,
                target_prob=one.target_prob,
                draft_prob=sampled_from[row][one.proposed_token_id] if row < len(sampled_from) else None,
                top2_margin=one.top2_margin,
                accepted=one.accepted,
                reason=one.reason,
            )
            for row, one in enumerate(explained)
        ]
        return target_pb2.ExplainVerifyResponse(positions=positions)

    def started(self, ids, kept=0):
        return target_pb2.SessionStarted(
            session_id="s",
            prompt_token_ids=ids[kept:],
            cached_tokens=kept,
            length=len(ids),
            max_block_tokens=7,
            max_length=1024,
        )


def half(token_id: int) -> common_pb2.SparseDistribution:
    """What an id was sampled from, if it was as probable as another one."""
    return common_pb2.SparseDistribution(token_ids=[token_id, 49], probs=[0.5, 0.5])


class Breaking(TargetServicer):
    """Ends its first call, or `always` every one, after a few answers with a status and trailing metadata."""

    def __init__(self, code: grpc.StatusCode, *trailing: tuple[str, str | bytes], always: bool = False) -> None:
        super().__init__()
        self.code, self.trailing, self.always = code, trailing, always
        self.calls = 0

    def _broken(self, answers, context):
        self.calls += 1
        breaks = self.always or self.calls == 1
        for n, answer in enumerate(answers):
            if breaks and n == 3:
                context.set_trailing_metadata(self.trailing)
                if self.code is not grpc.StatusCode.OK:
                    context.abort(self.code, "broken")
                return
            yield answer

    def Verify(self, requests, context):
        return self._broken(super().Verify(requests, context), context)

    def Generate(self, request, context):
        return self._broken(super().Generate(request, context), context)


@dataclass
class DraftServicer(draft_pb2_grpc.DraftServiceServicer):
    """A perfect draft, which ends its stream after `cut_after` asks."""

    cut_after: int | None = None
    ended: Event = field(default_factory=Event)

    def GetModelInfo(self, request, context):
        info = common_pb2.ModelInfo(model="draft", phase=common_pb2.PHASE_READY, fingerprint=FINGERPRINT)
        return draft_pb2.DraftServiceGetModelInfoResponse(info=info)

    def Propose(self, requests, context):
        context.add_callback(self.ended.set)
        start = next(requests).start
        log = list(start.token_ids)
        yield draft_pb2.ProposeResponse(started=draft_pb2.ProposeStarted(proposer=common_pb2.SOURCE_MODEL))
        for i, request in enumerate(requests):
            if i == self.cut_after:
                return
            if request.HasField("start"):
                start = request.start
                log = list(start.token_ids)
                yield draft_pb2.ProposeResponse(started=draft_pb2.ProposeStarted(proposer=common_pb2.SOURCE_MODEL))
                continue
            ask = request.ask
            log[ask.from_position :] = ask.token_ids
            said = continuation(log, ask.max_tokens * ask.proposals, start.sampling.seed)
            rejection = start.sampling.rule == common_pb2.ACCEPTANCE_RULE_REJECTION
            for index in range(ask.proposals):
                ids = said[index * ask.max_tokens :][: ask.max_tokens]
                yield draft_pb2.ProposeResponse(
                    proposal=draft_pb2.Proposal(
                        round=ask.round,
                        index=index,
                        base_length=len(log) + index * ask.max_tokens,
                        token_ids=ids,
                        draft_probs=[half(id_) for id_ in ids] if rejection else [],
                        source=common_pb2.SOURCE_MODEL,
                    )
                )


@contextlib.contextmanager
def serving(
    target: TargetServicer | None = None,
    draft: DraftServicer | None = None,
    listen: str = "127.0.0.1:0",
    health: HealthServicer | None = None,
) -> Iterator[str]:
    """The address of a server with the given services; it reports to be healthy, or what `health` says."""
    server = grpc.server(ThreadPoolExecutor(8))
    if target is not None:
        target_pb2_grpc.add_TargetServiceServicer_to_server(target, server)
    if draft is not None:
        draft_pb2_grpc.add_DraftServiceServicer_to_server(draft, server)
    if health is not None:
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
    else:
        check = grpc.unary_unary_rpc_method_handler(lambda request, context: b"\x08\x01")
        handlers = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})
        server.add_generic_rpc_handlers([handlers])
    port = server.add_insecure_port(listen)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0.2).wait()
