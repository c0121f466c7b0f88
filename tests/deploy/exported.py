"""Names of the metrics that the project's processes have, and of those that a query asks for."""

from __future__ import annotations

import re

from prometheus_client import CollectorRegistry

from specpair.metrics import ClientMetrics
from specpair_draft.metrics import DraftMetrics
from specpair_gateway.metrics import RequestMetrics
from specpair_runtime.serving import ServiceStatus
from specpair_runtime.serving.calls import Calls
from specpair_runtime.serving.metrics import CallMetrics, describe_process, watch_phase
from specpair_runtime.slots import SlotPool
from specpair_target.metrics import VerifyMetrics

_SUFFIXES = {"counter": "_total", "info": "_info"}
_OF_HISTOGRAMS = re.compile(r"_(bucket|sum|count)$")


def registries():
    """The registry of each kind of process, as its main makes it, with everything registered that ever is."""
    pool = SlotPool(1, 0, 0.0)
    target, draft, gateway = CollectorRegistry(), CollectorRegistry(), CollectorRegistry()
    VerifyMetrics(target).engine.watch(pool, queue=0, recompilations=int)
    drafting = DraftMetrics(draft)
    drafting.engine.watch(pool, queue=0, recompilations=int)
    drafting.watch_lookups(pool)
    for service in (target, draft):
        describe_process(service, service="test")
        watch_phase(service, ServiceStatus())
        CallMetrics(service, Calls())
    describe_process(gateway, service="gateway")
    ClientMetrics(gateway)
    RequestMetrics(gateway)
    return {"target": target, "draft": draft, "gateway": gateway}


def exported(registry):
    """The project's own families in a registry by name, as Prometheus has it, with the type of each."""
    found = {f"{family.name}{_SUFFIXES.get(family.type, '')}": family.type for family in registry.collect()}
    return {name: kind for name, kind in found.items() if name.startswith("specpair_")}


def asked_for(text, histograms):
    """The project's metrics that a text names; a histogram by its own name, whichever of its series it is."""
    names = set(re.findall(r"\bspecpair_\w+", text))
    shortened = {_OF_HISTOGRAMS.sub("", name) for name in names}
    return {name for name in names if _OF_HISTOGRAMS.sub("", name) not in histograms} | (shortened & histograms)
