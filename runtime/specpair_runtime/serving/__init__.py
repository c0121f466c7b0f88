"""What both services share around gRPC: configuration, logs, health, reflection, errors, and an orderly end."""

from __future__ import annotations

from specpair_runtime.serving.attended import Attended
from specpair_runtime.serving.caller import Caller
from specpair_runtime.serving.config import ServiceConfig
from specpair_runtime.serving.interceptors import CallInterceptor
from specpair_runtime.serving.logs import configure as configure_logs
from specpair_runtime.serving.record import Stopwatch, annotate, annotate_at_end, stage
from specpair_runtime.serving.server import run, serve
from specpair_runtime.serving.status import ServiceStatus, StatusSnapshot

__all__ = [
    "Attended",
    "CallInterceptor",
    "Caller",
    "ServiceConfig",
    "ServiceStatus",
    "StatusSnapshot",
    "Stopwatch",
    "annotate",
    "annotate_at_end",
    "configure_logs",
    "run",
    "serve",
    "stage",
]
