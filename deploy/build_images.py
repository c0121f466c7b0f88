#!/usr/bin/env python3
"""Builds the images for a CPU with docker or buildah, and runs them: the demo pair, health, a generation, a compile.

    deploy/build_images.py                                        with docker where there is one, else buildah, as root
    deploy/build_images.py --torch-index https://pypi.org/simple --wheels DIRECTORY     torch's CPU wheel from there
    deploy/build_images.py --check                                what was built before

Needs Python 3.11 or newer and nothing else; buildah also needs util-linux and iproute2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from engines import CACHE, Buildah, Docker, Engine, Running

IMAGES = {
    "client": "specpair-client",
    "target": "specpair-target:cpu",
    "draft": "specpair-draft:cpu",
    "compiling": "specpair-target:cpu-compile",
}
# Seconds that a service may take to load, and to load and compile.
LOADING, COMPILING = 120, 600
PROBE = f"""
import importlib.util, json, os, shutil, sys
def writable(place):
    try:
        open(os.path.join(place, ".probe"), "w").close()
    except OSError as error:
        return error.strerror
    os.unlink(os.path.join(place, ".probe"))
    return True
print(json.dumps(dict(
    user=[os.getuid(), os.getgid(), os.getgroups()],
    capabilities=[line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")][0],
    compilers=[name for name in ("gcc", "g++", "cc", "c++", "clang") if shutil.which(name)],
    torch=importlib.util.find_spec("torch") is not None,
    read_only=bool(os.statvfs("/").f_flag & os.ST_RDONLY),
    root=writable("/opt/specpair"), cache=writable({CACHE!r}),
    mode=oct(os.stat({CACHE!r}).st_mode & 0o777),
)))
"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("docker", "buildah"), default="docker" if docker() else "buildah")
    parser.add_argument("--dockerfile", default="deploy/Dockerfile")
    parser.add_argument("--base-image", help="instead of the Dockerfile's, with a `python` of 3.11 or newer")
    parser.add_argument("--torch-index", help="instead of torch's own index of CPU wheels")
    parser.add_argument(
        "--wheels", type=Path, help="directory of wheels for target and draft, beside those of an index"
    )
    parser.add_argument(
        "--compiler", default="g++", help="packages to compile with; Debian's Python also needs python3-dev"
    )
    parser.add_argument("--check", action="store_true", help="build nothing")
    return parser.parse_args()


def docker() -> bool:
    """Whether there is a docker to build with; a client without an engine is none."""
    return shutil.which("docker") is not None and os.system("docker info > /dev/null 2>&1") == 0


def build(engine: Engine, options: argparse.Namespace) -> None:
    """Builds every image."""
    given = ["-f", options.dockerfile]
    if options.base_image:
        given += ["--build-arg", f"BASE_IMAGE={options.base_image}"]
    services = [*given]
    if options.torch_index:
        services += ["--build-arg", f"TORCH_INDEX={options.torch_index}"]
    if options.wheels:
        services += ["--build-context", f"wheels={options.wheels.resolve()}"]
    engine.build(IMAGES["client"], [*given, "--target", "client", "."])
    for role in ("target", "draft"):
        engine.build(IMAGES[role], [*services, "--target", role, "."])
    engine.build(
        IMAGES["compiling"], [*services, "--build-arg", f"COMPILER={options.compiler}", "--target", "target", "."]
    )


def check_image(engine: Engine, name: str) -> None:
    """Who runs, what is in the image, and what may be written to."""
    tag = IMAGES[name]
    found = json.loads(engine.run(tag, ["python", "-c", PROBE], name))
    version = engine.run(tag, ["specpair", "--version"], name)
    print(f"{tag}: {engine.size(tag) / 1e6:.0f} MB, specpair {version}, {json.dumps(found)}", flush=True)
    assert engine.config(tag)["User"] == "10001:10001"
    assert found["user"] in ([10001, 10001, []], [10001, 10001, [10001]])
    assert int(found["capabilities"], 16) == 0
    assert found["torch"] == (name != "client")
    assert bool(found["compilers"]) == (name == "compiling")
    assert found["read_only"]
    assert found["root"] is not True
    assert found["cache"] is True
    assert found["mode"] == "0o700"
    print("  pip:", engine.run(tag, ["python", "-m", "pip", "--no-cache-dir", "check"], name), flush=True)


@contextlib.contextmanager
def serving(engine: Engine, name: str, settings: Mapping[str, str], within: float) -> Iterator[None]:
    """A service that its image's health command calls healthy; it has to end by SIGTERM with status 0."""
    role = "draft" if name == "draft" else "target"
    upper = role.upper()
    own = {f"SPECPAIR_{upper}_MODEL": f"/opt/specpair/models/demo/{role}", f"SPECPAIR_{upper}_THREADS": "1"}
    service: Running = engine.start(IMAGES[name], {**own, "HF_HUB_OFFLINE": "1", **settings}, name)
    try:
        begin = time.monotonic()
        assert service.health() != 0, "healthy before it has loaded"
        while service.health() != 0:
            assert service.alive(), "ended"
            assert time.monotonic() < begin + within, f"not healthy within {within} s"
            time.sleep(1)
        print(f"{IMAGES[name]}: healthy after {time.monotonic() - begin:.0f} s", flush=True)
        yield
        status = service.stop()
        assert status == 0, f"exit status {status}"
        print(f"{IMAGES[name]}: ended by SIGTERM with status 0", flush=True)
    except BaseException:
        print(service.log(), file=sys.stderr)
        raise


def generate(engine: Engine, draft: str, *flags: str) -> str:
    """Token ids that the client's image prints for a prompt."""
    command = ["specpair", "generate", "def fibonacci(n):", "--ids", "--max-new-tokens=48", f"--draft={draft}", *flags]
    return engine.run(IMAGES["client"], command, "client")


def check_pair(engine: Engine, target: str, settings: Mapping[str, str], within: float) -> None:
    """The services of two images, and a client of the third: the same tokens whoever proposes."""
    draft_settings = {"SPECPAIR_DRAFT_DTYPE": "fp32"}
    with serving(engine, target, settings, within), serving(engine, "draft", draft_settings, LOADING):
        for flags in ((), ("--temperature=0.8", "--seed=1")):
            alone, pair = (generate(engine, draft, *flags) for draft in ("none", "127.0.0.1:50052"))
            print(" ".join(["generate", *flags]), "->", pair, flush=True)
            assert pair.split()
            assert pair == alone, f"with a draft {pair}, without {alone}"


def check_compiled(engine: Engine) -> None:
    """A compiled target, and what it leaves in its cache for the next start."""
    small = {f"SPECPAIR_TARGET_{name}": value for name, value in {"COMPILE": "on", "SLOTS": "1"}.items()}
    small["SPECPAIR_TARGET_MAX_LENGTH"] = "256"
    for _ in range(2):
        check_pair(engine, "compiling", small, COMPILING)
        count = f"import os; print(sum(len(files) for *_, files in os.walk('{CACHE}/.cache/specpair')))"
        files = int(engine.run(IMAGES["compiling"], ["python", "-c", count], "compiling"))
        print(f"{IMAGES['compiling']}: {files} files of compiled steps in its cache", flush=True)
        assert files


def main() -> None:
    """Builds, checks, and fails at the first thing that is not as it should be."""
    options = parse()
    os.chdir(Path(__file__).parents[1])
    engine: Engine = Docker() if options.engine == "docker" else Buildah()
    try:
        if not options.check:
            build(engine, options)
        for name in IMAGES:
            check_image(engine, name)
        check_pair(engine, "target", {}, LOADING)
        check_compiled(engine)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
