"""Something to be seen on the dashboard: a demo pair, clients, accidents, and a Prometheus that scrapes all of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry, start_http_server
from tests.e2e.processes import DEMO, Service

from specpair import SamplingParams, SpecpairError, SpeculativeClient
from specpair.metrics import ClientMetrics

_HOST = "127.0.0.1"
# Where metrics are served, by the job that scrapes them; and Prometheus itself. The ports that the documentation names.
_PORTS = {"specpair-target": 9464, "specpair-draft": 9465, "specpair-client": 9467}
_PROMETHEUS = 9090

# Who proposes, by client; there are fewer slots, so that some wait while all of them ask.
_KINDS = ("draft", "draft", "none", "draft", "ngram", "draft")
_SLOTS = 4
_FEW = 3
# When things happen, in shares of the whole time.
_ALL_BEGIN, _ALL_END = 0.2, 0.4
_DRAFT_LOST, _DRAFT_BACK, _TARGET_LOST = 0.5, 0.65, 0.85

_TOKENS = 96
# Seconds: before a client asks again that was refused, unless it was told when; and that Prometheus has to start.
_PAUSE = 0.5
_START = 60.0


@contextlib.contextmanager
def observed(seconds: float, configuration: Path) -> Iterator[str]:
    """The address of a Prometheus that has watched the pair under load for so long, with a configuration's own pace.

    More clients than slots for a while, the draft killed and started again later, in the end the target killed and
    started again at once. Raises RuntimeError when Prometheus does not start or does not stay.
    """
    with tempfile.TemporaryDirectory(prefix="specpair-load-") as directory, contextlib.ExitStack() as stack:
        logs = Path(directory)
        registry = CollectorRegistry()
        server, _ = start_http_server(_PORTS["specpair-client"], _HOST, registry)
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        services: dict[str, Service] = {}
        for role in ("target", "draft"):
            services[role] = _service(role, logs)
            stack.callback(services[role].stop)
        process = stack.enter_context(_prometheus(logs, configuration))
        asyncio.run(_live(**services, seconds=seconds, metrics=ClientMetrics(registry)))
        if process.poll() is not None:
            raise RuntimeError(f"Prometheus has ended: {(logs / 'prometheus.log').read_text()}")
        yield f"http://{_HOST}:{_PROMETHEUS}"


def _service(role: str, logs: Path) -> Service:
    listen = f"--metrics-listen={_HOST}:{_PORTS[f'specpair-{role}']}"
    return Service(role, logs / f"{role}.log", f"--model={DEMO / role}", f"--slots={_SLOTS}", listen)


@contextlib.contextmanager
def _prometheus(logs: Path, configuration: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is ready, with the intervals and the alerts of a configuration."""
    settings = yaml.safe_load(configuration.read_text())
    settings["rule_files"] = [str(configuration.parent / name) for name in settings["rule_files"]]
    settings["scrape_configs"] = [
        {"job_name": job, "static_configs": [{"targets": [f"{_HOST}:{port}"]}]} for job, port in _PORTS.items()
    ]
    here = logs / "prometheus.yml"
    here.write_text(yaml.safe_dump(settings))
    command = [
        "prometheus",
        f"--config.file={here}",
        f"--storage.tsdb.path={logs / 'series'}",
        f"--web.listen-address={_HOST}:{_PROMETHEUS}",
    ]
    log = logs / "prometheus.log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + _START
            while not _ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"Prometheus does not start: {log.read_text()}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()


def _ready() -> bool:
    # A proxy that the surroundings name is not for loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{_HOST}:{_PROMETHEUS}/-/ready", timeout=_START):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


async def _live(target: Service, draft: Service, seconds: float, metrics: ClientMetrics) -> None:
    lines = (DEMO / "heldout.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["text"] for line in lines]
    # Waits until both are healthy. A service that is started again has the address that it had.
    asked, drafts = target.address, {"draft": draft.address}
    begun = time.monotonic()

    async def until(share: float) -> None:
        await asyncio.sleep(begun + share * seconds - time.monotonic())

    async def ask(number: int) -> None:
        few = number < _FEW
        await until(0 if few else _ALL_BEGIN)
        kind = _KINDS[number]
        async with SpeculativeClient(asked, drafts.get(kind, kind), metrics=metrics) as client:
            await _ask(client, prompts[number:], number, begun + (1 if few else _ALL_END) * seconds)

    async def accidents() -> None:
        await until(_DRAFT_LOST)
        await asyncio.to_thread(draft.kill)
        await until(_DRAFT_BACK)
        draft.restart()
        await until(_TARGET_LOST)
        await asyncio.to_thread(target.kill)
        target.restart()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(accidents())
        for number in range(len(_KINDS)):
            tasks.create_task(ask(number))


async def _ask(client: SpeculativeClient, prompts: Sequence[str], seed: int, end: float) -> None:
    """Asks one prompt after the other until `end`, greedy and sampled in turn."""
    for prompt, temperature in zip(itertools.cycle(prompts), itertools.cycle((0.0, 0.8)), strict=False):
        if time.monotonic() > end:
            return
        try:
            await client.generate(prompt, SamplingParams(max_new_tokens=_TOKENS, temperature=temperature, seed=seed))
        except SpecpairError as error:
            await asyncio.sleep(error.retry_after or _PAUSE)
