"""What both services share around gRPC: configuration, logs, health, reflection, errors, and an orderly end."""

from __future__ import annotations

from specpair_runtime.serving.config import ServiceConfig
from specpair_runtime.serving.interceptors import REQUEST_ID, CallInterceptor, annotate
from specpair_runtime.serving.logs import configure as configure_logs
from specpair_runtime.serving.server import run, serve
from specpair_runtime.serving.status import ServiceStatus, StatusSnapshot

__all__ = [
    "REQUEST_ID",
    "CallInterceptor",
    "ServiceConfig",
    "ServiceStatus",
    "StatusSnapshot",
    "annotate",
    "configure_logs",
    "run",
    "serve",
]
