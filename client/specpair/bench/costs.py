"""What single steps cost, asked of the services directly: a draft token, a verify step, and what lies between steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from specpair.errors import ProtocolError
from specpair.loop import Loop
from specpair.messages import Committed, DraftAsk, DraftStart, DraftStarted, Start, Started
from specpair.params import SamplingParams
from specpair.transports import DraftTransport, TargetTransport

__all__ = ["Steps", "draft_token_seconds", "resumed", "step_times"]


@dataclass(frozen=True, slots=True)
class Steps:
    """Plain decoding over a Verify stream, block by block without proposals: seconds of every step but the first."""

    forward: tuple[float, ...]
    """The target's forward passes, as it reports them."""
    between: tuple[float, ...]
    """What a round takes besides waiting for the engine and its forward pass: wire, client, scheduling."""
    rounds: tuple[float, ...]
    token_ids: tuple[int, ...]


async def step_times(target: TargetTransport, prompt: Sequence[int], params: SamplingParams) -> Steps:
    """Continues a prompt by empty blocks and times each of them, from block to block."""
    stream = await target.verify(Start(tuple(prompt), params))
    forward, between, rounds = [], [], []
    try:
        started = await stream.receive()
        if not isinstance(started, Started):
            raise ProtocolError("the target's first message is not `started`")
        loop = Loop(started, params)
        mark = time.perf_counter()
        while loop.finish_reason is None:
            await stream.send(loop.verify(loop.propose(0), None))
            verdict = await stream.receive()
            if isinstance(verdict, Started):
                raise ProtocolError("the target started twice")
            loop.commit(verdict)
            now = time.perf_counter()
            forward.append(verdict.forward_us / 1e6)
            rounds.append(now - mark)
            between.append(max(now - mark - (verdict.forward_us + verdict.queue_us) / 1e6, 0.0))
            mark = now
        await stream.finish()
    finally:
        stream.cancel()
    # The first one waits for the prefill.
    ids = tuple(loop.token_ids[loop.prompt_length :])
    return Steps(tuple(forward[1:]), tuple(between[1:]), tuple(rounds[1:]), ids)


async def draft_token_seconds(
    draft: DraftTransport, prompt: Sequence[int], vocabulary: int, *, longest: int, asks: int = 24
) -> float:
    """Seconds to draft one more token: the slope between proposals of one id and of `longest`.

    Every ask rejects the whole proposal before it, so that nothing that was drafted ahead can be of use.
    """
    stream = await draft.propose(DraftStart(tuple(prompt), SamplingParams(max_new_tokens=4 * asks)))
    seconds: dict[int, list[float]] = {1: [], longest: []}
    length = len(prompt)
    news: tuple[int, ...] = ()
    try:
        if not isinstance(await stream.receive(), DraftStarted):
            raise ProtocolError("the draft proposed before it started")
        for number in range(asks):
            wanted = longest if number % 2 else 1
            began = time.perf_counter()
            await stream.send(DraftAsk(number + 1, length, news, wanted))
            answer = await stream.receive()
            took = time.perf_counter() - began
            if isinstance(answer, DraftStarted):
                raise ProtocolError("the draft started twice")
            if number >= 4 and len(answer.token_ids) == wanted:  # the first ones include the prefill
                seconds[wanted].append(took)
            length += len(news)
            news = ((answer.token_ids[0] + 1) % vocabulary if answer.token_ids else 1,)
    finally:
        stream.cancel()
    if not all(seconds.values()) or longest == 1:
        return 0.0
    return max(statistics.median(seconds[longest]) - statistics.median(seconds[1]), 0.0) / (longest - 1)


async def resumed(
    target: TargetTransport, prompt: Sequence[int], params: SamplingParams, token_ids: Sequence[int]
) -> tuple[int, ...]:
    """A generation that is opened again behind its first `token_ids`: those and what the target says next."""
    receiver = await target.generate(Start(tuple(prompt), params, tuple(token_ids)))
    found, finished = list(token_ids), False
    try:
        while not finished:
            message = await receiver.receive()
            if isinstance(message, Committed):
                found += message.token_ids
                finished = message.finish_reason is not None
        await receiver.finish()
    finally:
        receiver.cancel()
    return tuple(found)
