"""The client: text in, text out, with a draft and a target service behind it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypedDict

from specpair.compatibility import Pairing
from specpair.corpus import Corpus
from specpair.credentials import Credentials
from specpair.drafting import Drafting
from specpair.errors import InvalidRequestError, SpecpairError
from specpair.grpc_transports import GrpcDraft, GrpcTarget
from specpair.loop import Loop
from specpair.messages import DraftStart, Explain, ModelInfo, Started
from specpair.naming import DEFAULT_DRAFT, DEFAULT_TARGET, draft_of, target_addresses
from specpair.params import Prediction, Prompt, SamplingParams
from specpair.replicas import Replicas
from specpair.request import Observer, observed
from specpair.request_ids import request_id_of
from specpair.results import PositionExplanation, Result
from specpair.resuming import Way
from specpair.session import Session, follow
from specpair.stream import TokenStream
from specpair.tracing import request_contexts
from specpair.transports import DraftTransport, TargetTransport
from specpair.turn import Turn

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

__all__ = ["DEFAULT_DRAFT", "DEFAULT_TARGET", "ClientOptions", "SpeculativeClient"]

_log = logging.getLogger("specpair")

# Seconds, some 30 years. Deadlines of 300 years and more are over at once.
_LONGEST = 1e9


class ClientOptions(TypedDict, total=False):
    """Everything a client can be told besides its addresses."""

    draft_length: int | None
    """Ids to ask the proposer for in each round. None, the default: as many as measured to be fastest."""
    draft_timeout: float
    """Seconds that a draft service may take for one round. Default 2. A turn's first proposal may take five times that,
    though nothing waits for it longer than for others: lookups propose meanwhile."""
    chain: int | None
    """Blocks to send ahead of a verdict, each on the assumption that all before it comes true. None, the default: as
    many as measured to be fastest, which is none where the network is quick. 0: none."""
    connect_timeout: float
    """Seconds for the services to say what they run, when the client first uses them; and for a target that was there
    before to be back when something begins. Default 5."""
    resume_timeout: float
    """Seconds that the target may be away in a generation, without any new token, before that is an error; until then
    the generation goes on by itself, with the same tokens. 0: losing the target is an error at once. Default 30."""
    lookup: bool | None
    """Whether lookups propose beside the draft service's model, wherever they have brought more tokens in the time.
    None, the default: yes, but not by themselves under the rejection rule or with a fixed draft length. False: the
    model alone, as long as it can be reached."""
    corpus: Corpus | None
    """Earlier outputs and other texts to look up in, to which every finished output is added. None, the default: no
    generation leaves anything behind for another; see `Corpus` before sharing one between callers."""
    credentials: Credentials | None
    """TLS, mutual TLS and a token, for both services. None, the default: plain text, as on one machine."""
    draft_credentials: Credentials | None
    """For the draft service in their place; `Credentials()` is plain text without a token. None: the same for both."""
    metrics: Observer | None
    """Counts the client's generations, as `specpair.metrics.ClientMetrics` does. None, the default: nobody does."""
    tracer_provider: TracerProvider | None
    """OpenTelemetry's, for spans of generations. None, the default: the application's global one, if it has any."""
    target_transport: TargetTransport | Sequence[TargetTransport] | None
    """Used in place of gRPC to the target's address, or to each of them."""
    draft_transport: DraftTransport | None
    """Used in place of gRPC to the draft's address."""


class SpeculativeClient:
    """Generates text with a pair of services. Any number of generations may run at once.

    `draft` says who proposes, which decides the speed and never the output:

        "HOST:PORT"         a draft service, and prompt lookup beside it where that has proved better (`lookup`);
                            DraftMismatchError if its vocabulary is another than the target's
        "auto:HOST:PORT"    the same, but prompt lookup in place of a draft with another vocabulary; "auto" alone
                            means the default address
        "ngram"             prompt lookup in this process
        "none"              nobody: the target decodes token by token in a loop of its own

    A draft service that is lost, late or talks nonsense is replaced by prompt lookup in all generations at once, and
    used again, also in their middle, when it is back; `Stats.proposer_changes` says when and why. A client belongs to
    the event loop that first uses it.

    `target` is the address of a target service, or of several that run the same, with commas between: when one is lost
    the next one takes over, and each generation goes on where it stands (`resume_timeout`). One that runs something
    else is passed over; if no other one is left that is an UnavailableError with the reason TARGET_CHANGED.

    An address may also stand for several services of a kind, "dns:///NAME:PORT" or "ipv4:IP:PORT,IP:PORT": generations
    are spread evenly over those that are healthy.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        draft: str = DEFAULT_DRAFT,
        *,
        draft_length: int | None = None,
        draft_timeout: float = 2.0,
        chain: int | None = None,
        connect_timeout: float = 5.0,
        resume_timeout: float = 30.0,
        lookup: bool | None = None,
        corpus: Corpus | None = None,
        credentials: Credentials | None = None,
        draft_credentials: Credentials | None = None,
        metrics: Observer | None = None,
        tracer_provider: TracerProvider | None = None,
        target_transport: TargetTransport | Sequence[TargetTransport] | None = None,
        draft_transport: DraftTransport | None = None,
    ) -> None:
        if draft_length is not None and draft_length < 0:
            raise InvalidRequestError("must not be negative", field="draft_length")
        if not draft_timeout > 0:  # NaN is neither
            raise InvalidRequestError("must be above 0", field="draft_timeout")
        if chain is not None and chain < 0:
            raise InvalidRequestError("must not be negative", field="chain")
        if not resume_timeout >= 0:
            raise InvalidRequestError("must not be negative", field="resume_timeout")
        kind, address = draft_of(draft)
        self._connect_timeout = connect_timeout
        self._resume_timeout = resume_timeout
        self._contexts = observed(request_contexts(tracer_provider), metrics)
        addresses = target_addresses(target)
        if target_transport is None:
            target_transport = [GrpcTarget(address, credentials) for address in addresses]
        elif not isinstance(target_transport, Sequence):
            target_transport = [target_transport]
        self._target = Replicas(list(zip(addresses, target_transport, strict=True)), within=connect_timeout)
        self._draft: DraftTransport | None = None
        pairing = None
        if kind in ("model", "auto"):
            self._draft = draft_transport or GrpcDraft(address, draft_credentials or credentials)
            pairing = Pairing(self._target, self._draft, within=connect_timeout)
        self._drafting = Drafting(
            kind,
            self._target,
            pairing,
            length=draft_length,
            timeout=draft_timeout,
            lookup=lookup,
            corpus=corpus,
            chain=chain,
            info=self._target_info,
        )

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prediction: Prediction | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the services are told too
        request_id: str | None = None,
    ) -> Result:
        """Continues a prompt. Raises any exception of `specpair.errors`; DeadlineError after `timeout` seconds.

        `prediction` is what the output is expected to be, for example the text that is to be edited: as far as it comes
        true, tokens come in whole blocks. With `draft="none"` nobody proposes it.

        `request_id` is what the logs of both services are to call it: up to 128 of the characters `A-Za-z0-9._:/+=-`.
        Without one, or with one that is none, it gets a fresh id. `Result.request_id` and errors say which.
        """
        async with self.stream(prompt, params, prediction=prediction, timeout=timeout, request_id=request_id) as stream:
            async for _ in stream:
                pass
        return stream.result

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prediction: Prediction | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> TokenStream:
        """Continues a prompt, chunk by chunk, with the provenance of every token."""
        timeout = _limit(timeout)
        turn = Turn(prompt, params or SamplingParams(), prediction, self._contexts(request_id_of(request_id)))
        if self._drafting.kind == "none":
            return TokenStream(turn, follow(self._way(timeout), turn), timeout)
        session = Session(self._way(timeout), self._drafting.session(timeout))
        return TokenStream(turn, session.only(turn), timeout)

    def session(self, *, request_id: str | None = None) -> Session:
        """Several turns on one KV cache: `async with client.session() as session`. See `Session`.

        They have one `request_id`, as the session is one call at each service.
        """
        return Session(self._way(), self._drafting.session(), partial(self._contexts, request_id_of(request_id)))

    async def explain(
        self,
        prompt: Prompt,
        proposal_token_ids: Sequence[int] | None = None,
        params: SamplingParams | None = None,
    ) -> tuple[PositionExplanation, ...]:
        """Why the target would accept or reject each id of a proposal behind a prompt, for debugging.

        Without a proposal the client's proposer makes one, as the first of a generation; under the rejection rule its
        probabilities are part of it. The last explanation is for the place behind the proposal.
        """
        params = params or SamplingParams()
        if proposal_token_ids is None:
            return await self._target.explain(await self._proposed(prompt, params))
        return await self._target.explain(Explain(prompt, params, proposal_token_ids))

    async def info(self) -> tuple[ModelInfo, ModelInfo | None]:
        """What the target and the draft run; None without a draft service, or if it cannot be reached."""
        target = await self._target_info()
        if self._draft is None:
            return target, None
        try:
            return target, await self._draft.info(self._connect_timeout)
        except SpecpairError as unreachable:
            _log.warning("draft unreachable: %s", unreachable)
            return target, None

    async def healthy(self) -> tuple[bool, bool | None]:
        """Whether the target and the draft report to be serving; None without a draft service."""
        return await _healthy(self._target, self._connect_timeout), (
            await _healthy(self._draft, self._connect_timeout) if self._draft is not None else None
        )

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, as the target would continue it."""
        return await self._target.tokenize(prompt)

    async def detokenize(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return await self._target.detokenize(tuple(token_ids), keep_special_tokens)

    async def aclose(self) -> None:
        """Closes the connections; generations that still run fail."""
        await self._drafting.aclose()
        await self._target.close()
        if self._draft is not None:
            await self._draft.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _proposed(self, prompt: Prompt, params: SamplingParams) -> Explain:
        """What the proposer says behind a prompt, as the first block of a session would carry it."""
        info = await self._target_info()
        ids = await self._target.tokenize(prompt)
        draft = self._drafting.session(length=max(info.verify_width - 1, 0))
        try:
            plan = await draft.plan(Turn(prompt, params))
            started = Started("", ids, 0, len(ids), max(info.verify_width - 1, 0), info.max_length)
            loop = Loop(started, params, vocabulary_size=plan.vocabulary_size)
            ask = loop.propose(self._drafting.length)
            proposer = plan.proposer(DraftStart(ids, params))
            block = loop.verify(ask, await proposer.propose(ask) if ask.max_tokens else None)
        finally:
            draft.cancel()
        return Explain(ids, params, block.token_ids, block.draft_probs)

    async def _target_info(self) -> ModelInfo:
        return await self._target.info(self._connect_timeout)

    def _way(self, within: float | None = None) -> Way:
        return Way(self._target, self._resume_timeout, within)


def _limit(timeout: float | None) -> float | None:
    """Seconds that a generation may take; None beyond what gRPC has numbers for. Raises InvalidRequestError for NaN."""
    if timeout is None or timeout >= _LONGEST:
        return None
    if math.isnan(timeout):
        raise InvalidRequestError("must be a number of seconds", field="timeout")
    return timeout


async def _healthy(service: TargetTransport | DraftTransport, within: float) -> bool:
    try:
        return await service.healthy(within)
    except SpecpairError:
        return False
