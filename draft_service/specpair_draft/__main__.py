"""`python -m specpair_draft`, `specpair-draft`: runs the draft service."""

from __future__ import annotations

import sys

import grpc
from prometheus_client import CollectorRegistry

from specpair.v1 import draft_pb2, draft_pb2_grpc
from specpair_draft.config import DraftConfig
from specpair_draft.metrics import DraftMetrics
from specpair_draft.servicer import DraftServicer
from specpair_runtime.serving import ServiceStatus, configure_logs, run
from specpair_runtime.serving.metrics import describe_process, watch_phase

__all__ = ["main"]


def main() -> None:
    """Runs the service until it is told to stop."""
    config = DraftConfig.parse(prog="specpair-draft")
    configure_logs(config.log_format, config.log_level)
    status = ServiceStatus()
    registry = CollectorRegistry()
    model = config.model or config.proposer
    watch_phase(registry, status)
    describe_process(registry, service="draft", model=model, dtype=config.dtype, quantization=config.quantization)
    servicer = DraftServicer(config, status, DraftMetrics(registry))

    def register(server: grpc.aio.Server) -> list[str]:
        draft_pb2_grpc.add_DraftServiceServicer_to_server(servicer, server)
        return [draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name]

    sys.exit(run(config, register=register, load=servicer.load, status=status, close=servicer.stop, registry=registry))


if __name__ == "__main__":
    main()
