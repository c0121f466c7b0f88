"""Configuration of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from specpair import Credentials
from specpair.addresses import is_local
from specpair.client import ClientOptions
from specpair_runtime.serving.config import Settings

__all__ = ["GatewayConfig"]


class GatewayConfig(Settings):
    """The gateway: OpenAI's HTTP API in front of a target and a draft service."""

    model_config = SettingsConfigDict(env_prefix="SPECPAIR_GATEWAY_")

    listen: str = Field("127.0.0.1:8000", description="Address to serve on, HOST:PORT; port 0 takes a free one.")
    target: str = Field("127.0.0.1:50051", description="Address of the target service, or several with commas between.")
    draft: str = Field(
        "auto", description="Who proposes: HOST:PORT of a draft service, auto, auto:HOST:PORT, ngram or none."
    )
    draft_length: int | None = Field(
        None, ge=0, description="Tokens to propose in each round; default: as many as measured to be fastest."
    )
    draft_timeout: float = Field(2.0, gt=0, description="Seconds that a draft service may take for one round.")
    lookup: bool = Field(True, description="Propose by prompt lookup beside the draft service where that is better.")
    connect_timeout: float = Field(5.0, gt=0, description="Seconds for the services to say what they run.")
    resume_timeout: float = Field(
        30.0, ge=0, description="Seconds that a target may be lost in a generation before that is an error."
    )
    served_model_name: str = Field(
        "", description="What the model is called, or several names with commas between; default: as the target does."
    )
    timeout: float = Field(600.0, ge=0, description="Seconds that one request may take; 0: as long as it takes.")
    stall_timeout: float = Field(
        60.0, ge=0, description="Seconds after which a stream ends whose client takes nothing of it; 0: never."
    )
    max_choices: int = Field(16, ge=1, le=1024, description="Most choices of one request, over all of its prompts.")
    max_body: int = Field(8 * 2**20, ge=1024, description="Most bytes of a request's body.")
    api_keys: str = Field("", description="File with the accepted API keys, NAME:KEY or NAME:sha256:HEX.")
    insecure_keys: bool = Field(False, description="Accept keys in plain text from other machines.")
    tls_cert: str = Field("", description="File with the certificate chain to serve HTTPS with, PEM.")
    tls_key: str = Field("", description="File with its private key, PEM.")
    service_tls: bool = Field(False, description="Connect to the services with TLS.")
    service_tls_ca: str = Field("", description="File with the CAs to trust for the services, PEM; turns TLS on.")
    service_tls_cert: str = Field("", description="File with the certificate chain to show to the services, PEM.")
    service_tls_key: str = Field("", description="File with its private key, PEM.")
    service_tls_server_name: str = Field(
        "", description="Name in the services' certificate, where it is not the address's."
    )
    service_token_file: str = Field("", description="File with the bearer token for the services.")
    service_insecure_token: bool = Field(False, description="Send it in plain text to other machines too.")

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert: HTTPS needs a certificate and its key")
        if self.api_keys and not (self.tls_cert or self.insecure_keys or is_local(self.listen)):
            raise ValueError(
                f"api_keys: keys would come in plain text to {self.listen}: give --tls-cert and --tls-key, listen on a "
                "loopback address, or give --insecure-keys where something in front ends TLS"
            )
        return self

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that were given to the model, none by default."""
        return tuple(name.strip() for name in self.served_model_name.split(",") if name.strip())

    @property
    def client_options(self) -> ClientOptions:
        """What the client is told. Raises InvalidRequestError for credentials that do not go together."""
        return {
            "draft_length": self.draft_length,
            "draft_timeout": self.draft_timeout,
            "lookup": None if self.lookup else False,
            "connect_timeout": self.connect_timeout,
            "resume_timeout": self.resume_timeout,
            "credentials": self._credentials,
        }

    @property
    def _credentials(self) -> Credentials:
        return Credentials(
            ca=self.service_tls_ca or None,
            cert=self.service_tls_cert or None,
            key=self.service_tls_key or None,
            token=Path(self.service_token_file) if self.service_token_file else None,
            server_name=self.service_tls_server_name or None,
            tls=True if self.service_tls else None,
            insecure_token=self.service_insecure_token,
        )
