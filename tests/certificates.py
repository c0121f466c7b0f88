"""Certificates made on the fly, as files."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import trustme

_LONG_AGO = datetime.datetime(2019, 1, 1, tzinfo=datetime.UTC)
_PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Pair:
    """A certificate chain and its key, in PEM."""

    chain: bytes
    key: bytes


class Authority:
    """A certificate authority whose certificate lies in a file."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory / name
        self._directory.mkdir()
        self._ca = trustme.CA(organization_name=name)
        self.pem = self._ca.cert_pem.bytes()
        self.path = self.write("ca.pem", self.pem)

    def pair(self, *names: str, expired: bool = False) -> Pair:
        """A pair for host names, addresses or an e-mail address."""
        until = {"not_before": _LONG_AGO, "not_after": _PAST} if expired else {}
        issued = self._ca.issue_cert(*names, **until)
        return Pair(b"".join(part.bytes() for part in issued.cert_chain_pems), issued.private_key_pem.bytes())

    def write(self, name: str, content: bytes) -> Path:
        """A file beside the authority's own."""
        path = self._directory / name
        path.write_bytes(content)
        path.chmod(0o600)
        return path

    def files(self, pair: Pair, name: str) -> tuple[Path, Path]:
        """A pair as two files, written over those of the same name."""
        return self.write(f"{name}.pem", pair.chain), self.write(f"{name}-key.pem", pair.key)
