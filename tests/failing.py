"""How a call ends that has to fail."""

from __future__ import annotations

import grpc

from specpair import errors


async def failure(call):
    """The error that a stream ends with; what comes before it is read and dropped."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.RpcError as failed:
        return errors.from_rpc_error(failed)
    raise AssertionError("it ended well")
