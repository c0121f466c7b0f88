"""A replica of Ray Serve: one service process, started, watched and drained."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading

import ray

from specpair.errors import SpecpairError
from specpair.grpc_transports import GrpcDraft, GrpcTarget
from specpair_ray.attached import command
from specpair_ray.options import Options, Role
from specpair_ray.ports import Claim

__all__ = ["Replica"]

# Seconds between two looks at a service that starts.
_POLL = 0.2
# Seconds for an answer of a service that serves. It answers within milliseconds, a busy machine aside.
_ANSWER = 5.0
# Seconds beyond its grace for a service to end.
_LAST_WORDS = 5.0


class Replica:
    """Runs `specpair-target` or `specpair-draft` as a process of its own: the very service that runs without Ray.

    Serve calls these methods; no request ever comes through it.
    """

    async def __init__(self, role: Role, options: Options) -> None:  # type: ignore[misc]  # Serve awaits it
        """Returns when the service serves. Raises RuntimeError if it ends instead, or if no port is free."""
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._claim = Claim(options.host or ray.util.get_node_ip_address(), options.port_range)
        self._metrics = Claim(*options.metrics) if options.metrics else None
        self._service: GrpcTarget | GrpcDraft = (GrpcTarget if role == "target" else GrpcDraft)(
            self._claim.address, options.credentials
        )
        flags = [f"--listen={self._claim.address}", f"--grace={options.grace:g}", *options.flags]
        if self._metrics is not None:
            flags.append(f"--metrics-listen={self._metrics.address}")
        # From this very thread, which lives as long as the replica.
        self._process = process = subprocess.Popen(  # noqa: ASYNC220 - which takes milliseconds
            command(f"specpair_{role}", *flags), stdin=subprocess.DEVNULL
        )
        while not await self._serves():
            if process.poll() is not None:
                raise RuntimeError(f"the {role} ended with status {process.returncode}; its log says why")
            await asyncio.sleep(_POLL)
        threading.Thread(target=self._follow, args=(process,), name="follow", daemon=True).start()

    async def check_health(self) -> None:
        """Raises an exception of `specpair.errors`, or RuntimeError, when the service is not to be used any more."""
        if not await self._service.healthy(_ANSWER):
            raise RuntimeError("the service does not serve")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `BySlots` goes by."""
        info = await self._service.info(_ANSWER)
        return {"slots": info.slots, "slots_in_use": info.slots_in_use}

    async def __del__(self) -> None:
        """Drains: Serve calls it before it ends this process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, self._options.grace + _LAST_WORDS)
        except subprocess.TimeoutExpired:
            process.kill()
        await self._service.close()
        self._claim.release()
        if self._metrics is not None:
            self._metrics.release()

    async def _serves(self) -> bool:
        try:
            return await self._service.healthy(_ANSWER)
        except SpecpairError:
            return False

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        """Ends with the service: Serve then sees at once that another replica is needed."""
        process.wait()
        if self._process is not None:
            os._exit(1)
