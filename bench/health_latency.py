"""How long a health check takes while the services compute: `python bench/health_latency.py`.

Probes and load come from processes of their own, so that neither waits for the other's interpreter. Loads:

* idle: nobody asks for anything;
* sessions: so many sessions at once, with the pair;
* prefill: the same, and prompts as long as a slot one after another;
* messages: the same as prefill, and the largest messages that the target takes or refuses: texts, token ids to
  detokenize, prompts of millions of ids.

Loads take turns, repeat by repeat. Prints a table and writes JSON to bench/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from report import OtherWork, machine, pin, write_report
from specpair import SamplingParams, SpeculativeClient
from specpair.services import started
from specpair.v1 import common_pb2, target_pb2, target_pb2_grpc

_LOADS = ("idle", "sessions", "prefill", "messages")
# What the 99th percentile should stay below while sessions run and prompts are prefilled.
_LIMIT_MS = 100.0
_LIMITED = {"idle", "sessions", "prefill"}
# As many ids as fit into a message.
_MANY = 4_000_000


@dataclass(frozen=True)
class Options:
    """What is measured; defaults are those of the published figures."""

    models: Path = Path("models/demo")
    sessions: int = 4
    max_length: int = 2048
    seconds: float = 8.0
    pause_ms: float = 5.0
    repeats: int = 3
    threads: int = 1


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the health checks of one service under one load, over all repeats."""

    load: str
    service: str
    checks: int
    p50_ms: float
    p99_ms: float
    longest_ms: float


def probe(address: str, options: Options) -> list[float]:
    """Milliseconds of one check after another, for a while."""
    times = []
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        check(health_pb2.HealthCheckRequest(), timeout=60)
        end = time.perf_counter() + options.seconds
        while (began := time.perf_counter()) < end:
            answer = check(health_pb2.HealthCheckRequest(), timeout=60)
            times.append(1e3 * (time.perf_counter() - began))
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                raise RuntimeError(f"{address} is not serving")
            time.sleep(options.pause_ms / 1e3)
    return times


def load(kind: str, target: str, draft: str, options: Options, ready: Any) -> None:  # noqa: ANN401
    """Asks for what a load asks for until the process is ended."""
    asyncio.run(_load(kind, target, draft, options, ready))


async def _load(kind: str, target: str, draft: str, options: Options, ready: Any) -> None:  # noqa: ANN401
    lines = (options.models / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    async with SpeculativeClient(target, draft) as client, grpc.aio.insecure_channel(target) as channel:
        ids = list(itertools.chain.from_iterable([await client.tokenize(text) for text in texts[:60]]))
        work: list[Coroutine[Any, Any, None]] = [
            _sessions(client, ids[number * 64 :][:128]) for number in range(options.sessions)
        ]
        if kind in ("prefill", "messages"):
            work.append(_prompts(client, ids, options.max_length))
        if kind == "messages":
            work += _messages(target_pb2_grpc.TargetServiceStub(channel), "".join(texts), options.max_length)
        ready.set()
        await asyncio.gather(*work)


async def _sessions(client: SpeculativeClient, prompt: Sequence[int]) -> None:
    while True:
        await client.generate(prompt, SamplingParams(max_new_tokens=128, ignore_eos=True))


async def _prompts(client: SpeculativeClient, ids: Sequence[int], length: int) -> None:
    """Prompts as long as a slot, each another one."""
    for start in itertools.count():
        prompt = (list(ids[start % 1000 :]) + list(ids) * (length // len(ids)))[: length - 1]
        await client.generate(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True))


def _messages(stub: target_pb2_grpc.TargetServiceAsyncStub, text: str, length: int) -> list[Coroutine[Any, Any, None]]:
    """The largest messages of three kinds, again and again."""
    long = (text * (1 + 65_000 // len(text)))[:65_000]
    requests = [
        (stub.Tokenize, target_pb2.TokenizeRequest(prompt=common_pb2.Prompt(text=long))),
        (stub.Detokenize, target_pb2.DetokenizeRequest(token_ids=[5] * length)),
        (
            stub.Tokenize,
            target_pb2.TokenizeRequest(prompt=common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=[5] * _MANY))),
        ),
    ]

    async def again(method: Any, request: Any) -> None:  # noqa: ANN401
        while True:
            with contextlib.suppress(grpc.RpcError):
                await method(request)

    return [again(method, request) for method, request in requests]


def measure(options: Options, addresses: tuple[str, str]) -> list[Latency]:
    """Every load, in turns."""
    spawning = multiprocessing.get_context("spawn")
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.repeats):
        for kind in _LOADS:
            ready = spawning.Event()
            process = spawning.Process(target=load, args=(kind, *addresses, options, ready), daemon=True)
            if kind != "idle":
                process.start()
                ready.wait()
            try:
                for service, address in zip(("target", "draft"), addresses, strict=True):
                    times.setdefault((kind, service), []).extend(probe(address, options))
            finally:
                if kind != "idle":
                    process.kill()
                    process.join()
    return [_latency(kind, service, found) for (kind, service), found in times.items()]


def _latency(kind: str, service: str, times: Sequence[float]) -> Latency:
    return Latency(
        load=kind,
        service=service,
        checks=len(times),
        p50_ms=round(statistics.median(times), 2),
        p99_ms=round(statistics.quantiles(times, n=100)[98], 2),
        longest_ms=round(max(times), 2),
    )


def _options() -> tuple[Options, int, Path]:
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=default.models, help="directory with target/ and draft/")
    parser.add_argument("--sessions", type=int, default=default.sessions)
    parser.add_argument("--max-length", type=int, default=default.max_length)
    parser.add_argument("--seconds", type=float, default=default.seconds, help="for each load, service and repeat")
    parser.add_argument("--pause-ms", type=float, default=default.pause_ms, help="between two checks")
    parser.add_argument("--repeats", type=int, default=default.repeats)
    parser.add_argument("--threads", type=int, default=default.threads, help="of each service")
    parser.add_argument("--cores", type=int, default=2, help="cores that everything runs on")
    parser.add_argument("--output", type=Path, default=Path("bench/results/health_latency.json"))
    said = vars(parser.parse_args())
    cores, output = said.pop("cores"), said.pop("output")
    return Options(**said), cores, output


def main() -> None:
    """Measures and writes the report."""
    options, count, output = _options()
    cores = pin(count)
    facts, noise = machine(cores), OtherWork()
    common = [
        f"--threads={options.threads}",
        f"--slots={options.sessions + 1}",
        f"--max-length={options.max_length}",
        "--log-format=console",
        "--log-level=warning",
    ]
    with started(
        [f"--model={options.models / 'target'}", *common], [f"--model={options.models / 'draft'}", *common]
    ) as services:
        for service in services:
            asyncio.run(service.wait(lambda *_: None))
        found = measure(options, (services[0].address, services[1].address))
    for one in found:
        print(
            f"{one.load:9} {one.service:7} {one.checks:6} checks  p50 {one.p50_ms:7.2f}  p99 {one.p99_ms:7.2f}"
            f"  longest {one.longest_ms:8.2f} ms"
        )
    worst = max(one.p99_ms for one in found if one.load in _LIMITED)
    figures = {
        "options": {**asdict(options), "models": options.models.name},
        "latencies": [asdict(one) for one in found],
        "limit": {"loads": sorted(_LIMITED), "p99_ms": _LIMIT_MS, "worst_ms": worst, "met": worst <= _LIMIT_MS},
        "cores_busy_with_other_work": noise.cores(),
    }
    write_report(output, figures, facts)


if __name__ == "__main__":
    main()
