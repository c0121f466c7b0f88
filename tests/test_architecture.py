"""Imports go one way, and modules stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import specpair
from specpair.v1 import common_pb2, draft_pb2, target_pb2

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ROOT / "client/specpair"
RUNTIME = ROOT / "runtime/specpair_runtime"
TARGET = ROOT / "target_service/specpair_target"
DRAFT = ROOT / "draft_service/specpair_draft"
GATEWAY = ROOT / "gateway/specpair_gateway"
RAY = ROOT / "deploy/ray/specpair_ray"
GENERATED = CLIENT / "v1"
MOST_LINES = 420

# What the client may import besides the standard library; the command line has rich and typer on top.
CLIENT_NEEDS = {"specpair", "grpc", "grpc_status", "google"}
CLI_NEEDS = {"platformdirs", "prompt_toolkit", "rich", "typer"}
CLI = {"chat/", "cli.py", "commands/", "connecting.py", "demo.py", "phases.py", "rendering.py", "bench/tables.py"}
# Plots come on top of that, and traces where the API of OpenTelemetry is installed.
PLOTS = {"bench/plots.py"}
METRICS = {"metrics.py"}
TRACES = {"tracing.py", "client.py"}
# What everything but the client may import from the client's package.
SHARED = {f"specpair.{name}" for name in ("v1", "addresses", "errors", "extras", "ngram", "pem", "request_ids")}
# Modules that speak in protobuf messages. Everything else speaks in types of its own.
BORDER = {"wire.py", "servicer.py", "grpc_transports.py", "__main__.py"}


def _sources(*roots: Path) -> list[Path]:
    found = [path for root in roots for path in sorted(root.rglob("*.py")) if GENERATED not in path.parents]
    assert found
    return found


def _imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports, as `package.module` or `package.module.name`, nested imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively, which these laws do not follow"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _top(name: str) -> str:
    return name.partition(".")[0]


def _below(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _offences(paths: list[Path], offends) -> list[str]:
    return [f"{path.relative_to(ROOT)}: {name}" for path in paths for name in _imports(path) if offends(path, name)]


def test_client_needs_grpc_and_protobuf_alone():
    """The client imports the standard library, grpc and protobuf; the command line's modules also typer and rich."""

    def offends(path, name):
        allowed = CLIENT_NEEDS | sys.stdlib_module_names
        if path.relative_to(CLIENT).as_posix().startswith(tuple(CLI)):
            allowed |= CLI_NEEDS
        if path.relative_to(CLIENT).as_posix() in PLOTS:
            allowed |= {"matplotlib"}
        if path.relative_to(CLIENT).as_posix() in TRACES:
            allowed |= {"opentelemetry"}
        if path.relative_to(CLIENT).as_posix() in METRICS:
            allowed |= {"prometheus_client"}
        return _top(name) not in allowed

    assert _offences(_sources(CLIENT), offends) == []


def test_importing_the_client_is_light():
    """`import specpair` loads no torch, no transformers, no numpy, nothing of the services or the command line."""
    heavy = [
        "torch",
        "transformers",
        "numpy",
        "rich",
        "typer",
        "prompt_toolkit",
        "specpair_runtime",
        "specpair_target",
        "specpair_draft",
    ]
    heavy += ["opentelemetry", "prometheus_client"]
    code = f"import sys, specpair; sys.exit(' '.join(set({heavy}) & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_runtime_stands_on_the_protocol():
    """The runtime takes stubs, errors and n-grams from the client's package, and nothing from a service."""

    def offends(path, name):
        if _top(name) == "specpair":
            return not _below(name, SHARED)
        return _top(name) in {"specpair_target", "specpair_draft"}

    assert _offences(_sources(RUNTIME), offends) == []


@pytest.mark.parametrize(("service", "other"), [(TARGET, "specpair_draft"), (DRAFT, "specpair_target")])
def test_services_do_not_know_each_other(service, other):
    """A service imports the runtime and the shared part of the client's package, never the other service."""

    def offends(path, name):
        return _top(name) == other or (_top(name) == "specpair" and not _below(name, SHARED))

    assert _offences(_sources(service), offends) == []


def test_the_gateway_is_a_user_of_the_client():
    """It takes the client's public names, and of the runtime what surrounds a server: no service and no message."""
    public = {f"specpair.{name}" for name in specpair.__all__}
    others = {
        "specpair.addresses.is_local",
        "specpair.client.ClientOptions",
        "specpair.extras.launch",
        "specpair.metrics.ClientMetrics",
        "specpair.request_ids.request_id_of",
    }
    libraries = {
        "fastapi",
        "prometheus_client",
        "pydantic",
        "pydantic_settings",
        "starlette",
        "structlog",
        "uvicorn",
        "specpair_gateway",
    }

    def offends(path, name):
        if _top(name) == "specpair":
            return name not in public | others
        if _top(name) == "specpair_runtime":
            return not _below(name, {"specpair_runtime.serving"})
        return _top(name) not in libraries | sys.stdlib_module_names

    assert _offences(_sources(GATEWAY), offends) == []


def test_importing_the_gateway_is_light():
    """It loads no torch, no transformers, no numpy and no service."""
    heavy = ["torch", "transformers", "numpy", "specpair_target", "specpair_draft"]
    code = f"import sys, specpair_gateway.__main__; sys.exit(' '.join(set({heavy}) & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ray_runs_services_and_knows_none():
    """What places services takes of the client its transports, and of the services nothing: they are processes."""
    taken = {"specpair.Credentials", "specpair.errors", "specpair.grpc_transports"}

    def offends(path, name):
        if _top(name) == "specpair":
            return not _below(name, taken)
        return _top(name) not in {"ray", "pydantic", "specpair_ray"} | sys.stdlib_module_names

    assert _offences(_sources(RAY), offends) == []


def test_messages_stay_at_the_border():
    """Only wire modules, servicers, transports, mains and serving/ touch messages; enumerations may go further."""
    modules = {"specpair.v1.common_pb2": common_pb2, "specpair.v1.draft_pb2": draft_pb2}
    modules["specpair.v1.target_pb2"] = target_pb2

    def is_enumeration(name):
        module, _, member = name.rpartition(".")
        if module not in modules:
            return False
        enumerations = modules[module].DESCRIPTOR.enum_types_by_name
        return any(member == kind or member in enum.values_by_name for kind, enum in enumerations.items())

    def offends(path, name):
        if path.name in BORDER or RUNTIME / "serving" in path.parents:
            return False
        return _below(name, {"specpair.v1"}) and not is_enumeration(name)

    assert _offences(_sources(CLIENT, RUNTIME, TARGET, DRAFT, GATEWAY, RAY), offends) == []


def test_serving_knows_no_model():
    """What surrounds gRPC does not import torch, transformers, or the runtime's models and sampling."""

    def offends(path, name):
        heavy = _top(name) in {"torch", "transformers", "numpy"}
        return heavy or (_top(name) == "specpair_runtime" and not _below(name, {"specpair_runtime.serving"}))

    assert _offences(_sources(RUNTIME / "serving"), offends) == []


def test_no_search_path_is_changed():
    """Packages are found because they are installed: nothing touches sys.path or PYTHONPATH."""
    touched = []
    for path in _sources(CLIENT, RUNTIME, TARGET, DRAFT, GATEWAY, RAY, ROOT / "tools", ROOT / "bench"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in {"path", "addsitedir"}:
                if isinstance(node.value, ast.Name) and node.value.id in {"sys", "site"}:
                    touched.append(f"{path.relative_to(ROOT)}:{node.lineno}")
            elif isinstance(node, ast.Constant) and node.value == "PYTHON" + "PATH":
                touched.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert touched == []


def test_modules_are_small():
    """No module that people write is longer than a few screens."""
    lengths = {
        path.relative_to(ROOT): len(path.read_text().splitlines())
        for path in _sources(CLIENT, RUNTIME, TARGET, DRAFT, GATEWAY, RAY, ROOT / "tools", ROOT / "bench")
    }
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}
