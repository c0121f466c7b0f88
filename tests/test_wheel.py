"""What is built and installed: the client works by itself, and packages hold what they must and nothing else."""

from __future__ import annotations

import email
import json
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"specpair", *(f"specpair_{name}" for name in ("runtime", "target", "draft", "gateway", "ray"))}
# What modules of the client may miss where no extra is installed.
OPTIONAL = {"matplotlib", "opentelemetry", "platformdirs", "prometheus_client", "prompt_toolkit", "rich", "typer"}

IMPORT_ALL = """
import importlib, json, pkgutil, sys, specpair
missing = {}
for module in pkgutil.walk_packages(specpair.__path__, "specpair.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        missing[module.name] = error.name.partition(".")[0]
print(json.dumps([missing, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A source distribution, and the wheel that was built from it alone."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [source], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def clean(packages, tmp_path_factory):
    """The interpreter of an environment that has the wheel and what it says that it needs, nothing else.

    What it needs is taken from where it is installed here, so that no registry is asked.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    [site] = folder.glob("lib/python*/site-packages")
    for needed in _needed(_requirements(packages[1])).values():
        for file in needed.files or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                (site / file).symlink_to(file.locate())
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", packages[1]]
    subprocess.run(command, check=True, capture_output=True)
    return python


def _metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as opened:
        [name] = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(opened.read(name))


def _requirements(wheel: Path) -> list[str]:
    return _metadata(wheel).get_all("Requires-Dist") or []


def _needed(requirements: list[str]) -> dict[str, Distribution]:
    """What has to be installed for these, without any extra."""
    found: dict[str, Distribution] = {}
    waiting = list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[requirement.name] = distribution(requirement.name)
        waiting += found[requirement.name].requires or []
    return found


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_client_alone_needs_little(packages):
    """Without extras the wheel requires grpc, protobuf and what they need: no torch, no tokenizer, no numpy."""
    expected = {"grpcio", "grpcio-status", "googleapis-common-protos", "protobuf", "typing-extensions"}
    assert set(_needed(_requirements(packages[1]))) == expected


def test_the_client_alone_can_be_imported(clean):
    """In an environment with nothing else every module of the client imports, but for those that an extra brings."""
    done = _run(clean, "-I", "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    missing, loaded = json.loads(done.stdout)
    assert set(missing.values()) <= OPTIONAL
    assert {"specpair", "grpc", "google"} <= set(loaded)
    assert {"torch", "transformers", "numpy"} & set(loaded) == set()


def test_the_client_alone_knows_its_version(clean, packages):
    """`specpair.__version__` is that of the installed wheel."""
    done = _run(clean, "-I", "-c", "import specpair; print(specpair.__version__)")
    assert done.stdout.strip() == _metadata(packages[1])["Version"]


@pytest.mark.parametrize(
    ("command", "extra"),
    [("specpair", "cli"), ("specpair-target", "target"), ("specpair-draft", "draft"), ("specpair-gateway", "gateway")],
)
def test_commands_name_the_extra_that_they_need(clean, command, extra):
    """Without its extra a command says in one line what to install, and ends with 2."""
    done = _run(clean.parent / command, "--version")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        rf"error: (the )?{command}( command)? needs the extra {extra}: pip install 'specpair\[{extra}\]'.*\n",
        done.stderr,
    )


def test_the_wheel_has_what_is_imported_and_nothing_else(packages):
    """It holds the packages with their types, stubs and the licence: no tests, tools, models or protos."""
    with zipfile.ZipFile(packages[1]) as wheel:
        names = [Path(name) for name in wheel.namelist()]
    info = {name.parts[1:] for name in names if name.parts[0].endswith(".dist-info")}
    code = {name for name in names if not name.parts[0].endswith(".dist-info")}
    assert {name.parts[0] for name in code} == PACKAGES
    assert {name.suffix for name in code} == {".py", ".pyi", ".typed"}
    assert {Path(package, "py.typed") for package in PACKAGES} <= code
    assert {Path("specpair/v1", f"{name}_pb2.pyi") for name in ("common", "draft", "target")} <= code
    assert not [name for name in code if name.stem.startswith(("test_", "conftest"))]
    assert ("licenses", "LICENSE") in info
    assert _metadata(packages[1])["License-Expression"] == "Apache-2.0"


def test_the_source_distribution_is_the_project(packages):
    """It holds what building, testing, checking and the demo need, and nothing that was made on the way."""
    with tarfile.open(packages[0]) as source:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in source.getnames()}
    needed = [
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "mkdocs.yml",
        "constraints.txt",
        "package.json",
        ".ci/run",
    ]
    needed += ["protos/specpair/v1/target.proto", "protos/released.binpb", "protos/buf.yaml", "tools/generate_stubs.py"]
    needed += ["models/demo/target/model.safetensors", "models/demo/draft/model.safetensors", "docs/noise_vectors.json"]
    needed += ["tests/test_wheel.py", "deploy/Dockerfile"]
    assert [name for name in needed if name not in names] == []
    made = {".venv", "runs", "site", "dist", "build", ".git", "htmlcov"}
    assert made & {Path(name).parts[0] for name in names if name != "."} == set()
    assert [name for name in names if {"node_modules", "__pycache__"} & set(Path(name).parts)] == []
