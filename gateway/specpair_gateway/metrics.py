"""What Prometheus reads of the gateway itself; what comes of the generations is counted by the client."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

__all__ = ["RequestMetrics"]

_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)
_MODELS = "/v1/models"
_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", _MODELS, "/health")
_OTHER = "other"
# Nginx's word for a request whose client has gone.
_GONE = 499


class RequestMetrics:
    """Counts and times requests by endpoint and status. Without a registry nobody can read it."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._requests = Counter(
            "specpair_gateway_requests",
            "Requests that have ended, by endpoint and HTTP status; 499 is a client that went away.",
            ["endpoint", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "specpair_gateway_request_duration_seconds",
            "Seconds of a request, to the end of its stream.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )

    def ended(self, path: str, status: int, seconds: float) -> None:
        """A request has ended; a status of 0 is one that was never answered."""
        # Any caller can make up a path, and models have names.
        known = _MODELS if path.startswith(f"{_MODELS}/") else path
        endpoint = known if known in _ENDPOINTS else _OTHER
        self._requests.labels(endpoint, str(status or _GONE)).inc()
        self._seconds.labels(endpoint).observe(seconds)
