"""specpair: speculative decoding as a pair of gRPC services. This is the client.

    async with SpeculativeClient("127.0.0.1:50051", "127.0.0.1:50052") as client:
        result = await client.generate("def fibonacci(n):", SamplingParams(max_new_tokens=64))

A draft service proposes tokens, the target service verifies them in one forward pass, and the output is the target's,
token by token, whatever the draft says.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from specpair.client import SpeculativeClient
from specpair.corpus import Corpus
from specpair.credentials import Credentials
from specpair.errors import (
    CancelledError,
    DeadlineError,
    DraftMismatchError,
    InternalError,
    InvalidRequestError,
    ModelLoadError,
    OverloadedError,
    ProtocolError,
    SpecpairError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from specpair.messages import Fingerprint, ModelInfo, Phase
from specpair.params import AcceptanceRule, ChatMessage, Prediction, Prompt, SamplingParams
from specpair.results import (
    Chunk,
    FinishReason,
    Logprobs,
    PositionExplanation,
    ProposerChange,
    Result,
    Source,
    Stats,
    Token,
)
from specpair.session import Session
from specpair.stream import TokenStream
from specpair.sync import SyncSession, SyncSpeculativeClient, SyncTokenStream

__all__ = [
    "AcceptanceRule",
    "CancelledError",
    "ChatMessage",
    "Chunk",
    "Corpus",
    "Credentials",
    "DeadlineError",
    "DraftMismatchError",
    "Fingerprint",
    "FinishReason",
    "InternalError",
    "InvalidRequestError",
    "Logprobs",
    "ModelInfo",
    "ModelLoadError",
    "OverloadedError",
    "Phase",
    "PositionExplanation",
    "Prediction",
    "Prompt",
    "ProposerChange",
    "ProtocolError",
    "Result",
    "SamplingParams",
    "Session",
    "Source",
    "SpecpairError",
    "SpeculativeClient",
    "Stats",
    "SyncSession",
    "SyncSpeculativeClient",
    "SyncTokenStream",
    "Token",
    "TokenStream",
    "UnauthenticatedError",
    "UnavailableError",
    "UnsupportedError",
    "__version__",
]

try:
    __version__ = version("specpair")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"
