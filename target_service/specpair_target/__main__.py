"""`python -m specpair_target`, `specpair-target`: runs the target service, alone or as one of torchrun's processes."""

from __future__ import annotations

import sys
from typing import NoReturn

import grpc
import structlog
from prometheus_client import CollectorRegistry

from specpair.errors import SpecpairError
from specpair.v1 import target_pb2, target_pb2_grpc
from specpair_runtime.models.mirror import dismiss
from specpair_runtime.models.ranks import Ranks
from specpair_runtime.serving import ServiceStatus, configure_logs, run
from specpair_runtime.serving.metrics import describe_process, watch_phase
from specpair_target.config import TargetConfig
from specpair_target.engine import Engine
from specpair_target.metrics import VerifyMetrics
from specpair_target.servicer import TargetServicer

__all__ = ["main"]


def main() -> None:
    """Runs the service until it is told to stop; under torchrun in rank 0, with which the others compute."""
    config = TargetConfig.parse(prog="specpair-target")
    ranks = Ranks.of_torchrun()
    if ranks is not None and not ranks.leads:
        _follow(config, ranks)
    configure_logs(config.log_format, config.log_level)
    status = ServiceStatus()
    registry = CollectorRegistry()
    watch_phase(registry, status)
    describe_process(
        registry, service="target", model=config.model, dtype=config.dtype, quantization=config.quantization
    )
    servicer = TargetServicer(config, status, ranks, VerifyMetrics(registry))

    def register(server: grpc.aio.Server) -> list[str]:
        target_pb2_grpc.add_TargetServiceServicer_to_server(servicer, server)
        return [target_pb2.DESCRIPTOR.services_by_name["TargetService"].full_name]

    def close() -> None:
        servicer.stop()
        if ranks is not None:
            dismiss(ranks)

    exit_status = run(config, register=register, load=servicer.load, status=status, close=close, registry=registry)
    if ranks is not None:
        ranks.exit(exit_status)
    sys.exit(exit_status)


def _follow(config: TargetConfig, ranks: Ranks) -> NoReturn:
    # What happens to the service rank 0 tells.
    configure_logs(config.log_format, "error" if config.log_level == "error" else "warning")
    log = structlog.get_logger("specpair").bind(rank=ranks.rank)
    try:
        Engine.follow(config, ranks)
    except SpecpairError as error:
        log.error(f"failed: {error}")
        ranks.exit(1)
    except BaseException:
        log.exception("unexpected error")
        ranks.exit(1)
    ranks.leave()


if __name__ == "__main__":
    main()
