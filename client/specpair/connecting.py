"""The options of every command that connects to services: TLS, mutual TLS and tokens.

There is none that takes a token itself: what stands on a command line can be read by every user of the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from specpair.credentials import Credentials
from specpair.errors import InvalidRequestError

__all__ = ["Connecting"]

_PANEL = "Security"


def _file(flag: str, text: str) -> Any:  # noqa: ANN401 - typer's own
    return typer.Option(flag, metavar="FILE", help=text, show_default=False, rich_help_panel=_PANEL)


def _choice(flags: str, text: str) -> Any:  # noqa: ANN401
    return typer.Option(flags, help=text, show_default=False, rich_help_panel=_PANEL)


@dataclass(frozen=True)
class Connecting:
    """The options as given; each field is one."""

    tls: Annotated[
        bool | None,
        _choice("--tls/--no-tls", "Use TLS; default: if another option asks for it."),
    ] = None
    tls_ca: Annotated[Path | None, _file("--tls-ca", "CAs to trust, PEM.")] = None
    tls_cert: Annotated[Path | None, _file("--tls-cert", "Client certificate, PEM.")] = None
    tls_key: Annotated[Path | None, _file("--tls-key", "Its private key, PEM.")] = None
    tls_server_name: Annotated[
        str | None,
        typer.Option(
            "--tls-server-name",
            metavar="NAME",
            help="Name in the services' certificate, where it is not the address's.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    token_file: Annotated[Path | None, _file("--token-file", "File with a bearer token.")] = None
    insecure_token: Annotated[bool, _choice("--insecure-token", "Send it in plain text to other machines too.")] = False
    draft_tls: Annotated[
        bool | None,
        _choice("--draft-tls/--no-draft-tls", "TLS to the draft; default: as to the target."),
    ] = None
    draft_tls_ca: Annotated[Path | None, _file("--draft-tls-ca", "The draft's CAs; default: the target's.")] = None
    draft_token_file: Annotated[
        Path | None,
        _file("--draft-token-file", "The draft's token; default: the target's."),
    ] = None

    @property
    def target(self) -> Credentials:
        """For the target. Raises InvalidRequestError for options that do not go together."""
        return Credentials(
            ca=self.tls_ca,
            cert=self.tls_cert,
            key=self.tls_key,
            token=self.token_file,
            server_name=self.tls_server_name,
            tls=self.tls,
            insecure_token=self.insecure_token,
        )

    @property
    def draft(self) -> Credentials:
        """For the draft: the target's where nothing else is said, but never its token in plain text beside TLS.

        Raises InvalidRequestError for options that do not go together.
        """
        target = self.target
        if self.draft_tls is False and self.draft_tls_ca is not None:
            raise InvalidRequestError("is of no use with --no-draft-tls", field="draft_tls_ca")
        if self.draft_tls is False or not (target.secure or self.draft_tls or self.draft_tls_ca):
            shared = None if target.secure else self.token_file
            return Credentials(token=self.draft_token_file or shared, insecure_token=self.insecure_token)
        return Credentials(
            ca=self.draft_tls_ca or self.tls_ca,
            cert=self.tls_cert,
            key=self.tls_key,
            token=self.draft_token_file or self.token_file,
            server_name=self.tls_server_name,
            tls=True,
        )
