"""The option --wait, and what it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from specpair.connecting import Connecting
from specpair.grpc_transports import GrpcDraft, GrpcTarget
from specpair.naming import draft_of, target_addresses
from specpair.phases import showing
from specpair.rendering import decorated, stderr
from specpair.waiting import Waited, until_ready

__all__ = ["Wait", "WaitIfAsked", "wait_for", "wait_for_addresses"]


def _option(default: str = "") -> Any:  # noqa: ANN401 - as typer says of its options
    return typer.Option(
        metavar="SECONDS",
        envvar="SPECPAIR_WAIT",
        min=0,
        help=f"Wait so long for the services to serve, and show how far they are{default}.",
        show_default=False,
        rich_help_panel="Services",
    )


Wait = Annotated[
    float | None, _option("; default: on a terminal as long as the target is loading, else not. 0: not at all")
]
WaitIfAsked = Annotated[float | None, _option()]


async def wait_for(target: str, draft: str, connecting: Connecting, within: float | None) -> None:
    """Waits for the services of a command, given as it was given them; see `wait_for_addresses`."""
    address = draft_of(draft)[1]
    await wait_for_addresses(target_addresses(target), [address] if address else [], connecting, within)


async def wait_for_addresses(
    targets: Sequence[str],
    drafts: Sequence[str],
    connecting: Connecting,
    within: float | None,
    *,
    each: bool = False,
) -> None:
    """Waits for services as `until_ready` does; without a time only where somebody is watching, and for 0 seconds not
    at all.

    Raises what `until_ready` raises.
    """
    if within == 0 or (within is None and not decorated(stderr)):
        return
    services = [
        *(Waited("target", address, GrpcTarget(address, connecting.target)) for address in targets),
        *(Waited("draft", address, GrpcDraft(address, connecting.draft)) for address in drafts),
    ]
    try:
        with showing() as show:
            await until_ready(services, show, within=within, each=each)
    finally:
        for one in services:
            await one.service.close()
