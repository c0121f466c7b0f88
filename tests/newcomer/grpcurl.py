"""grpcurl's command line, carried out by `buf curl`: for machines that have no grpcurl.

Knows what the documentation uses, and says so where it is asked for something else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

_LOCAL = Path(__file__).parents[2] / "node_modules/.bin/buf"


def buf():
    """Where buf is; None if it is not installed."""
    return str(_LOCAL) if _LOCAL.exists() else shutil.which("buf")


def translated(arguments):
    """The arguments of buf for arguments of grpcurl. Ends the process if they are not understood."""
    parser = argparse.ArgumentParser(prog="grpcurl", allow_abbrev=False)
    parser.add_argument("-plaintext", action="store_true")
    parser.add_argument("-d", metavar="DATA")
    parser.add_argument("-H", metavar="HEADER", action="append", default=[])
    for name in ("cacert", "cert", "key", "servername"):
        parser.add_argument(f"-{name}")
    parser.add_argument("address")
    parser.add_argument("what", nargs="+")
    given = parser.parse_args(arguments)
    command = ["curl", "--protocol=grpc"]
    if given.plaintext:
        command.append("--http2-prior-knowledge")
    for name in ("cacert", "cert", "key", "servername"):
        if (value := getattr(given, name)) is not None:
            command.append(f"--{name}={value}")
    for header in given.H:
        command += [f"--header={header}", f"--reflect-header={header}"]
    if given.d is not None:
        command.append("--data=@-" if given.d == "@" else f"--data={given.d}")
    url = f"{'http' if given.plaintext else 'https'}://{given.address}"
    match given.what:
        case ["list"]:
            return [*command, "--list-services", url]
        case ["list", service]:
            return [*command, "--list-methods", f"{url}/{service}"]
        case [method] if "/" in method:
            return [*command, f"{url}/{method}"]
    return parser.error(f"{' '.join(given.what)} is not a method, nor `list`")


if __name__ == "__main__":
    os.execv(buf(), ["buf", *translated(sys.argv[1:])])
