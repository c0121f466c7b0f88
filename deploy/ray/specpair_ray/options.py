"""What an application is told, as `args` in a file that `serve` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from specpair import Credentials

__all__ = ["Options", "Role"]

Role = Literal["target", "draft"]

# Flags that a replica sets itself, and what decides them.
_OWN = {"--listen": "host and ports", "--grace": "grace", "--metrics-listen": "metrics_listen"}


class Options(BaseModel):
    """Of the replicas of one service."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flags: list[str] = Field(description="Of specpair-target or specpair-draft, but those that have a field here.")
    ports: str = Field(description="A replica takes the first free one on its machine: 50051, or 50051-50058.")
    host: str = Field("", description="Address to serve on; default: the machine's, as Ray knows it.")
    metrics_listen: str = Field("", description="Metrics, likewise: HOST:9464, or HOST:9464-9471; default: none.")
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
            if decides := _OWN.get(flag.partition("=")[0]):
                raise ValueError(f"{flag} is decided by {decides}")
        return value

    @field_validator("ports")
    @classmethod
    def _is_a_range(cls, value: str) -> str:
        if not _ports(value):
            raise ValueError("must be PORT or FIRST-LAST")
        return value

    @field_validator("metrics_listen")
    @classmethod
    def _is_a_host_with_a_range(cls, value: str) -> str:
        host, _, ports = value.rpartition(":")
        if value and not (host and _ports(ports)):
            raise ValueError("must be HOST:PORT or HOST:FIRST-LAST")
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
        return _ports(self.ports)

    @property
    def metrics(self) -> tuple[str, range] | None:
        """Address and ports for metrics, likewise; None without them."""
        host, _, ports = self.metrics_listen.rpartition(":")
        return (host.removeprefix("[").removesuffix("]"), _ports(ports)) if host else None

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


def _ports(written: str) -> range:
    """What PORT or FIRST-LAST stands for; nothing if it is neither."""
    first, _, last = written.partition("-")
    if not (first + (last or first)).isdecimal() or not 0 < int(first) <= int(last or first) <= 65535:
        return range(0)
    return range(int(first), int(last or first) + 1)
