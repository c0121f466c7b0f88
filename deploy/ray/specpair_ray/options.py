"""What an application is told, as `args` in a file that `serve` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from specpair import Credentials

__all__ = ["Options", "Role"]

Role = Literal["target", "draft"]


class Options(BaseModel):
    """Of the replicas of one service."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flags: list[str] = Field(description="Of specpair-target or specpair-draft, without --listen and --grace.")
    ports: str = Field(description="A replica takes the first free one on its machine: 50051, or 50051-50058.")
    host: str = Field("", description="Address to serve on; default: the machine's, as Ray knows it.")
    replicas: tuple[int, int] = Field((1, 1), description="Fewest and most replicas.")
    use: float = Field(0.75, gt=0, le=1, description="Share of all slots in use at which there are enough replicas.")
    upscale_delay: float = Field(30.0, ge=0, description="Seconds that it takes to be sure of needing more replicas.")
    downscale_delay: float = Field(600.0, ge=0, description="Seconds that it takes to be sure of needing fewer.")
    cpus: float = Field(1.0, ge=0, description="CPUs that Ray sets aside for a replica.")
    gpus: float = Field(0.0, ge=0, description="GPUs that Ray sets aside for a replica, which sees no other ones.")
    grace: float = Field(30.0, ge=0, description="Seconds that sessions get to end when a replica is taken away.")
    # A replica asks its own service for health and slots. These are files on every machine.
    ca: str = Field("", description="File with the CAs to trust, if the service has TLS.")
    cert: str = Field("", description="File with a certificate, if the service wants one of its clients.")
    key: str = Field("", description="File with its private key.")
    server_name: str = Field("", description="Name in the service's certificate.")
    token: str = Field("", description="File with a bearer token, if the service wants one.")

    @field_validator("flags")
    @classmethod
    def _leaves_the_address_alone(cls, value: list[str]) -> list[str]:
        for flag in value:
            if flag.partition("=")[0] in ("--listen", "--grace"):
                raise ValueError(f"{flag} is decided by host and ports, or grace")
        return value

    @field_validator("ports")
    @classmethod
    def _is_a_range(cls, value: str) -> str:
        first, _, last = value.partition("-")
        if not (first + (last or first)).isdecimal() or not 0 < int(first) <= int(last or first) <= 65535:
            raise ValueError("must be PORT or FIRST-LAST")
        return value

    @field_validator("replicas")
    @classmethod
    def _is_in_order(cls, value: tuple[int, int]) -> tuple[int, int]:
        # Without any replica nobody would count the sessions that want one.
        if not 1 <= value[0] <= value[1]:
            raise ValueError("must be the fewest, at least 1, and the most")
        return value

    @property
    def port_range(self) -> range:
        """The ports in the order in which they are tried."""
        first, _, last = self.ports.partition("-")
        return range(int(first), int(last or first) + 1)

    @property
    def credentials(self) -> Credentials:
        """For the replica's own questions."""
        return Credentials(
            ca=self.ca or None,
            cert=self.cert or None,
            key=self.key or None,
            server_name=self.server_name or None,
            token=Path(self.token) if self.token else None,
        )
