"""What stands in the Dockerfile, docker-compose.yml and the manifests, as plain data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = ("cpu-demo", "gpu", "gpu-secured")
ROLES = ("target", "draft")

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class Container:
    """A service as something would start it: what it gets besides its image's own environment."""

    where: str
    role: str
    environment: dict[str, str]
    arguments: list[str] = field(default_factory=list)
    grace: float = 0.0
    """Seconds between SIGTERM and SIGKILL."""


def variables(text):
    """Variables that a compose file takes from its surroundings, with the default of each; None without one."""
    return {name: default if written else None for name, written, default in _written(text)}


def compose(name="docker-compose.yml", **given):
    """A compose file, merged and with variables replaced by what is given, else by their defaults."""
    text = (ROOT / name).read_text()
    return yaml.safe_load(_VARIABLE.sub(lambda found: given.get(found[1], found[2] or ""), text))


def env_example():
    """Variables that .env.example sets, and those that it shows commented out."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(re.match(r"#?([A-Z_]+)=(.*)", line).groups() for line in lines if re.match(r"#?[A-Z_]+=", line))


def instructions():
    """The Dockerfile's stages: name to (instruction, rest) in order, those of the stages it is built on included."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages, stage = {}, []
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = stages[name] = list(stages.get(base, ()))
        stage.append((instruction, " ".join(rest.split())))
    return stages


def image_environment(stage):
    """What ENV sets in a stage."""
    found = {}
    for instruction, rest in instructions()[stage]:
        if instruction == "ENV":
            found.update(part.split("=", 1) for part in rest.split())
    return found


def health_command(stage):
    """The image's HEALTHCHECK as an argument list."""
    [rest] = [rest for instruction, rest in instructions()[stage] if instruction == "HEALTHCHECK"]
    return json.loads(rest.partition(" CMD ")[2])


def manifests(overlay):
    """What kustomize makes of an overlay. Skips the test when there is nothing to make it with."""
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    elif shutil.which("kustomize"):
        command = ["kustomize", "build"]
    else:
        pytest.skip("neither kubectl nor kustomize is installed")
    place = DEPLOY / "k8s/overlays" / overlay
    done = subprocess.run([*command, place], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def composed():
    """The containers of docker-compose.yml, alone and with TLS and tokens over it."""
    services, over = compose()["services"], compose("deploy/compose.secured.yml")["services"]
    for name, service in services.items():
        role = name.removesuffix("-cpu")
        if role not in ROLES:
            continue
        settings = env_example() if "env_file" in service else {}
        environment = {**settings, **service["environment"]}
        grace = float(service["stop_grace_period"].removesuffix("s"))
        yield Container(f"compose {name}", role, environment, grace=grace)
        yield Container(f"compose {name} secured", role, {**environment, **over[name]["environment"]}, grace=grace)


def deployed(overlay):
    """The containers of an overlay."""
    for manifest in manifests(overlay):
        if manifest["kind"] != "StatefulSet":
            continue
        pod = manifest["spec"]["template"]["spec"]
        [container] = pod["containers"]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        yield Container(
            f"{overlay} {container['name']}",
            container["name"],
            environment,
            container["args"],
            pod["terminationGracePeriodSeconds"],
        )


def _written(text):
    for found in _VARIABLE.finditer(text):
        yield found[1], found[2] is not None, found[2]
