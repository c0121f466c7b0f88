"""The option --wait, and what it does."""

from __future__ import annotations

from typing import Annotated

import typer

from specpair.connecting import Connecting
from specpair.grpc_transports import GrpcDraft, GrpcTarget
from specpair.naming import draft_of, target_addresses
from specpair.phases import showing
from specpair.rendering import decorated, stderr
from specpair.waiting import Waited, until_ready

__all__ = ["Wait", "wait_for"]

Wait = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        envvar="SPECPAIR_WAIT",
        min=0,
        help="Wait so long for the services to serve, and show how far they are; default: on a terminal as long as the "
        "target is loading, else not.",
        show_default=False,
        rich_help_panel="Services",
    ),
]


async def wait_for(target: str, draft: str, connecting: Connecting, within: float | None) -> None:
    """Waits for the services of a command as `until_ready` does; without a time only where somebody is watching.

    Raises what `until_ready` raises.
    """
    if within is None and not decorated(stderr):
        return
    services: list[Waited] = [
        Waited("target", address, GrpcTarget(address, connecting.target)) for address in target_addresses(target)
    ]
    if address := draft_of(draft)[1]:
        services.append(Waited("draft", address, GrpcDraft(address, connecting.draft)))
    try:
        with showing() as show:
            await until_ready(services, show, within=within)
    finally:
        for one in services:
            await one.service.close()
