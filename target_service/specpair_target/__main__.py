"""`python -m specpair_target`, `specpair-target`: runs the target service."""

from __future__ import annotations

import sys

import grpc

from specpair.v1 import target_pb2, target_pb2_grpc
from specpair_runtime.serving import ServiceStatus, configure_logs, run
from specpair_target.config import TargetConfig
from specpair_target.servicer import TargetServicer

__all__ = ["main"]


def main() -> None:
    """Runs the service until it is told to stop."""
    config = TargetConfig.parse(prog="specpair-target")
    configure_logs(config.log_format, config.log_level)
    status = ServiceStatus()
    servicer = TargetServicer(config, status)

    def register(server: grpc.aio.Server) -> list[str]:
        target_pb2_grpc.add_TargetServiceServicer_to_server(servicer, server)
        return [target_pb2.DESCRIPTOR.services_by_name["TargetService"].full_name]

    sys.exit(run(config, register=register, load=servicer.load, status=status, close=servicer.stop))


if __name__ == "__main__":
    main()
