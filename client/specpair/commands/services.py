"""`specpair info` and `specpair health`: what services run, and whether they serve."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Annotated

import typer

from specpair.commands.options import Draft, Json, Services, Target, opened
from specpair.commands.progress import WaitIfAsked, wait_for, wait_for_addresses
from specpair.connecting import Connecting
from specpair.errors import InvalidRequestError, SpecpairError
from specpair.grpc_transports import GrpcTarget
from specpair.messages import ModelInfo
from specpair.naming import DEFAULT_DRAFT, DEFAULT_TARGET, draft_of, target_addresses
from specpair.rendering import info_table, stderr, stdout

__all__ = ["health", "info"]


def info(as_json: Json = False, wait: WaitIfAsked = None, *, services: Services, connecting: Connecting) -> None:
    """Show what both services run."""

    async def ask() -> tuple[ModelInfo, ModelInfo | None]:
        async with opened(services, connecting) as client:
            if wait is not None:
                await wait_for(services.target, services.draft, connecting, wait)
            return await client.info()

    ours, theirs = asyncio.run(ask())
    if as_json:
        print(json.dumps({"target": asdict(ours), "draft": asdict(theirs) if theirs else None}))
    else:
        stdout.print(info_table(ours, theirs))


def health(
    context: typer.Context,
    target: Target = DEFAULT_TARGET,
    draft: Draft = DEFAULT_DRAFT,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 5.0,
    wait: WaitIfAsked = None,
    as_json: Json = False,
    *,
    connecting: Connecting,
) -> None:
    """Exit with 0 if the services serve, with 1 if one does not.

    Both are asked, or, with one of --target and --draft, that one; of several targets each.
    """
    flags = [name for name in ("target", "draft") if _is_flag(context, name)] or ["target", "draft"]
    asked: dict[str, list[str]] = {"target": target_addresses(target)} if "target" in flags else {}
    if "draft" in flags and (address := draft_of(draft)[1]):
        asked["draft"] = [address]
    if not asked:
        raise InvalidRequestError(f"{draft} is no service", field="draft")

    async def run() -> dict[str, bool]:
        if wait is not None:
            await _wait(wait)
        answers = {
            name: [await _serves(name, one, connecting, timeout) for one in them] for name, them in asked.items()
        }
        return {name: all(serving) for name, serving in answers.items()}

    async def _wait(seconds: float) -> None:
        try:
            await wait_for_addresses(asked.get("target", ()), asked.get("draft", ()), connecting, seconds, each=True)
        except SpecpairError as error:
            stderr.print(str(error))

    serving = asyncio.run(run())
    if as_json:
        print(json.dumps({name: {"address": ",".join(asked[name]), "serving": on} for name, on in serving.items()}))
    else:
        for name, on in serving.items():
            print(f"{name} {','.join(asked[name])}: {'serving' if on else 'not serving'}")
    raise typer.Exit(0 if all(serving.values()) else 1)


def _is_flag(context: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


async def _serves(name: str, address: str, connecting: Connecting, within: float) -> bool:
    service = GrpcTarget(address, connecting.target if name == "target" else connecting.draft)  # as all services
    try:
        return await service.healthy(within)
    except SpecpairError as error:
        stderr.print(f"{name} {address}: {error}")
        return False
    finally:
        await service.close()
