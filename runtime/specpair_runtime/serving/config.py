"""What services can be configured with, and how flags, environment and a file come together."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from specpair_runtime.serving.flags import CONFIG, flag_name, read_flags
from specpair_runtime.serving.logs import LogFormat, LogLevel


class Settings(BaseSettings):
    """Base of a server's configuration: a subclass adds fields with descriptions and an `env_prefix`."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True, validate_default=False)

    listen: str = Field("127.0.0.1:50051", description="Address to serve on, HOST:PORT; port 0 takes a free one.")
    log_format: LogFormat = Field("auto", description="auto: console on a terminal, JSON lines otherwise.")
    log_level: LogLevel = Field("info", description="Least level that is logged.")
    grace: float = Field(10.0, ge=0, description="Seconds that running calls get to finish after SIGTERM.")
    metrics_listen: str = Field(
        "",
        description="Address to serve Prometheus metrics on, in plain HTTP for everybody, HOST:PORT; default: none.",
    )

    otel: bool = Field(
        False, description="Export OpenTelemetry traces as the variables OTEL_... say; on if they name an endpoint."
    )

    @field_validator("listen", "metrics_listen")
    @classmethod
    def _names_a_port(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.field_name == "metrics_listen":
            return value
        if value.startswith("unix:") and info.field_name == "listen":
            return value
        host, _, port = value.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError("must be HOST:PORT with a port from 0 to 65535")
        return value

    @property
    def program(self) -> str:
        """The command that this configures, such as specpair-target."""
        return self.model_config.get("env_prefix", "").rstrip("_").lower().replace("_", "-") or "specpair"

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None, prog: str | None = None) -> Self:
        """The configuration from flags, else the environment, else the file named by --config, else the defaults.

        `argv` None takes the process's own. Prints one `error: FIELD: message` line per problem on stderr and raises
        SystemExit(2) when a value cannot be used; `--help` and unknown flags end the process as argparse does.
        """
        prefix = cls.model_config.get("env_prefix", "")
        flags = read_flags(cls.model_fields, argv, prog=prog, description=cls.__doc__, env_prefix=prefix)
        from_env = EnvSettingsSource(cls)()
        path = flags.pop(CONFIG, None) or os.environ.get(f"{prefix}{CONFIG}".upper())
        from_file = _read_file(path) if path else {}
        try:
            # pydantic-settings reads the environment too; what is passed here goes before it.
            return cls(**{**from_file, **from_env, **flags})
        except ValidationError as problems:
            origins = {
                **dict.fromkeys(from_file, str(path)),
                **{name: f"{prefix}{name}".upper() for name in from_env},
                **{name: flag_name(name) for name in flags},
            }
            _refuse(_describe(problems, origins, prefix))


class ServiceConfig(Settings):
    """Base of a service's configuration."""

    threads: int | None = Field(None, ge=1, description="CPU threads to compute with; default: torch's choice.")
    idle_timeout: float = Field(
        600.0,
        ge=0,
        le=1e6,
        description="Seconds after which a stream ends whose client neither sends nor reads; 0: never.",
    )
    max_connection_age: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Seconds after which a client has to connect anew, to find new replicas; 0: never.",
    )
    max_connection_age_grace: float = Field(
        0.0, ge=0, le=1e6, description="Seconds that calls get to end on such a connection; 0: as long as they take."
    )
    profile: str = Field("", description="Directory to write a trace of the first engine steps to.")
    profile_steps: int = Field(200, ge=1, le=10_000, description="Engine steps in a trace.")
    reflection: bool = Field(True, description="Answer server reflection, which grpcurl needs.")
    tls_cert: str = Field("", description="File with the certificate chain to serve TLS with, PEM.")
    tls_key: str = Field("", description="File with its private key, PEM.")
    tls_client_ca: str = Field("", description="File with the CAs whose client certificates are required, PEM.")
    auth_tokens: str = Field("", description="File with the accepted bearer tokens, NAME:TOKEN or NAME:sha256:HEX.")
    insecure_tokens: bool = Field(False, description="Accept tokens in plain text from other machines.")


def _read_file(path: str) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        _refuse([f"{CONFIG}: cannot read {path}: {error.strerror}"])
    except tomllib.TOMLDecodeError as error:
        _refuse([f"{CONFIG}: {path} is not TOML: {error}"])


def _describe(problems: ValidationError, origins: Mapping[str, str], prefix: str) -> list[str]:
    lines = []
    for problem in problems.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "missing":
            ways = f"{flag_name(name)}, {prefix.upper()}{name.upper()} or the configuration file"
            lines.append(f"{field}: is required: set {ways}")
        elif problem["type"] == "extra_forbidden":
            lines.append(f"{field}: unknown setting (from {origins.get(name, 'the configuration file')})")
        else:
            message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
            origin = f" (from {origins[name]})" if name in origins else ""
            lines.append(f"{field}: {message}, got {problem['input']!r}{origin}" if field else message)
    return lines


def _refuse(problems: Sequence[str]) -> NoReturn:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)
