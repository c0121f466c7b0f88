"""Laws of deploy/, docker-compose.yml and .dockerignore, as far as they can be checked without an engine."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import compose_spec
import huggingface_hub.constants
import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from specpair.commands import app
from specpair_draft.config import DraftConfig
from specpair_target.config import TargetConfig

from ..e2e.processes import script
from .files import (
    DEPLOY,
    OVERLAYS,
    ROLES,
    ROOT,
    compose,
    composed,
    deployed,
    env_example,
    health_command,
    image_environment,
    instructions,
    manifests,
    variables,
)

HEALTH = get_command(app).commands["health"]
COMPOSE_FILES = ("docker-compose.yml", "deploy/compose.secured.yml")
# Grafana's own, and what torch, the model hub, OpenTelemetry and Python read.
FOREIGN = ("GF_", "OTEL_", "HF_", "OMP_", "NVIDIA_", "PYTHON", "PATH", "COMPOSE_")


@pytest.fixture
def configuration(monkeypatch):
    """What a service makes of an environment and arguments, nothing else being set; SystemExit if it refuses."""
    configs = {"target": TargetConfig, "draft": DraftConfig}

    def parse(container):
        for name in list(os.environ):
            if name.startswith("SPECPAIR_"):
                monkeypatch.delenv(name)
        for name, value in {**image_environment(container.role), **container.environment}.items():
            if name.startswith("SPECPAIR_"):
                monkeypatch.setenv(name, value)
        return configs[container.role].parse(container.arguments)

    return parse


def settings():
    """Environment variables that the services and the client's command read."""
    fields = [
        f"{config.model_config['env_prefix']}{name}".upper()
        for config in (TargetConfig, DraftConfig)
        for name in config.model_fields
    ]
    options = [parameter.envvar for parameter in HEALTH.params if parameter.envvar]
    assert "SPECPAIR_TLS_CA" in options
    return {*fields, *options}


def containers():
    """Every container of compose and of the overlays."""
    yield from composed()
    for overlay in OVERLAYS:
        yield from deployed(overlay)


def compose_command():
    """Compose of version 2, as a plugin of docker or by itself. Skips the test where there is neither."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
            if done.returncode == 0 and not done.stdout.startswith("1."):
                return command
    pytest.skip("no Compose of version 2 is installed")


def unknown(names):
    """Those of some variables that nobody reads."""
    known = settings()
    return sorted(name for name in names if name not in known and not name.startswith(FOREIGN))


class TestImages:
    """The Dockerfile."""

    def test_lint(self):
        """hadolint finds nothing."""
        done = subprocess.run([script("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")

    @pytest.mark.parametrize("stage", ["client", *ROLES])
    def test_nobody_is_root(self, stage):
        """The last USER is a number, which a cluster can check to be another than root's."""
        assert [rest for instruction, rest in instructions()[stage] if instruction == "USER"][-1] == "10001:10001"

    def test_what_runs_has_no_secret(self):
        """No ENV and no ARG holds a token; a path to one is another thing."""
        names = [name for stage in instructions() for name in image_environment(stage)]
        names += [rest for stage in instructions().values() for instruction, rest in stage if instruction == "ARG"]
        assert not [name for name in names if "TOKEN" in name and not name.endswith("_PATH")]

    def test_variables_are_read(self):
        """Every variable that an image sets is a setting."""
        assert unknown(name for stage in ("client", *ROLES) for name in image_environment(stage)) == []

    def test_sources_are_let_through(self):
        """Every root of the distribution, and every file that an instruction copies or mounts, passes .dockerignore."""
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        let_through = [line[1:] for line in lines if line.startswith("!")]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        needed = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
        needed |= {"pyproject.toml", "constraints.txt", "LICENSE", project["project"]["readme"]}
        for stage in instructions().values():
            for instruction, rest in stage:
                words = rest.split()
                if instruction == "COPY" and not words[0].startswith("--from") and words[0] != ".":
                    needed.add(words[0])
                needed |= {part[7:] for word in words for part in word.split(",") if part.startswith("source=")}
        assert {"models/demo/target", "deploy/requirements.py"} <= needed
        assert [
            path for path in needed if not any((ROOT / path).is_relative_to(ROOT / one) for one in let_through)
        ] == []
        assert [path for path in needed if not (ROOT / path).exists()] == []

    def test_requirements(self):
        """The layer of requirements has those of the project and of its extras, and none of them twice."""
        command = [script("python"), DEPLOY / "requirements.py", "cli", *ROLES]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(project["dependencies"]) | set(project["optional-dependencies"]["cli"]) <= set(printed)
        assert any(requirement.startswith("torch>=") for requirement in printed)
        assert len(set(printed)) == len(printed)
        assert not any(requirement.startswith("specpair") for requirement in printed)


class TestCompose:
    """docker-compose.yml and what goes over it."""

    @pytest.mark.parametrize("name", COMPOSE_FILES)
    def test_schema(self, name):
        """It is what the Compose Specification says."""
        read = compose(name)
        assert set(compose_spec.PyCompose.from_yaml(yaml.safe_dump(read)).service_names()) == set(read["services"])

    @pytest.mark.parametrize("environment", ["/dev/null", ".env.example"])
    @pytest.mark.parametrize("files", [COMPOSE_FILES[:1], COMPOSE_FILES], ids=["plain", "secured"])
    def test_config(self, files, environment, monkeypatch):
        """Compose itself takes the files with every combination of profiles, and starts what these name and no more."""
        command = [*compose_command(), f"--env-file={environment}", *(f"--file={name}" for name in files)]
        for variable in {"COMPOSE_PROFILES", *variables((ROOT / files[0]).read_text())}:
            monkeypatch.delenv(variable, raising=False)
        # The example asks for GPUs by itself.
        always = {"gpu"} if environment == ".env.example" else set()
        profiles = {name: set(service["profiles"]) for name, service in compose()["services"].items()}
        every = sorted(set().union(*profiles.values()))
        for count in range(len(every) + 1):
            for chosen in itertools.combinations(every, count):
                given = [f"--profile={profile}" for profile in chosen]
                done = subprocess.run(
                    [*command, *given, "config", "--format=json"], cwd=ROOT, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, (chosen, done.stderr)
                started = {
                    name for name, asked in profiles.items() if asked & ({*chosen} | (set() if chosen else always))
                }
                assert set(json.loads(done.stdout)["services"]) == started, chosen

    @pytest.mark.parametrize("name", COMPOSE_FILES)
    def test_variables_have_defaults(self, name):
        """Without an .env everything has a value, and .env.example shows what there is."""
        found = variables((ROOT / name).read_text())
        assert [variable for variable, default in found.items() if default is None] == []
        assert set(found) <= set(env_example())

    def test_variables_are_read(self):
        """Every variable of every service is a setting, those of .env.example too."""
        own = set(variables((ROOT / "docker-compose.yml").read_text()))
        assert unknown(set(env_example()) - own) == []
        for name in COMPOSE_FILES:
            for service in compose(name)["services"].values():
                assert unknown(service.get("environment", {})) == []

    def test_hardened(self):
        """Every service is read-only, without capabilities or new privileges, within memory, published on loopback."""
        for name, service in compose()["services"].items():
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
            assert service["restart"], name
            assert service["deploy"]["resources"]["limits"]["memory"], name
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name

    def test_paths(self):
        """Files that are mounted and built from are there, and so are the stages."""
        read = compose()
        for service in read["services"].values():
            mounted = [volume.split(":")[0] for volume in service.get("volumes", ())]
            assert all((ROOT / path).exists() for path in mounted if path.startswith(".")), mounted
            assert {name for name in mounted if not name.startswith(".")} <= set(read["volumes"])
            if build := service.get("build"):
                assert (ROOT / build["dockerfile"]).is_file()
                assert build["target"] in instructions()
        for name in COMPOSE_FILES:
            given = compose(name)
            secrets = {secret for service in given["services"].values() for secret in service.get("secrets", ())}
            assert secrets == set(given["secrets"])

    def test_a_gpu_each(self):
        """Target and draft get a GPU of their own unless told otherwise."""
        services = compose()["services"]
        devices = [services[role]["deploy"]["resources"]["reservations"]["devices"] for role in ROLES]
        assert [[device["device_ids"] for device in of_role] for of_role in devices] == [[["0"]], [["1"]]]

    def test_scraped_names(self):
        """What Prometheus scrapes are services, or names that they answer to."""
        configuration = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
        jobs = {job["job_name"]: job["static_configs"] for job in configuration["scrape_configs"]}
        hosts = {f"specpair-{role}": [{"targets": [f"{role}:9464"]}] for role in ROLES}
        assert {name: jobs[name] for name in hosts} == hosts
        for role in ROLES:
            cpu = compose()["services"][f"{role}-cpu"]
            assert {network["aliases"][0] for network in cpu["networks"].values()} == {role}
        if promtool := shutil.which("promtool"):
            subprocess.run([promtool, "check", "config", DEPLOY / "prometheus/prometheus.yml"], check=True)


class TestKubernetes:
    """The manifests."""

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_schema(self, overlay):
        """Every manifest is what Kubernetes takes, without a field that it does not know."""
        for manifest in manifests(overlay):
            kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_variables_are_read(self, overlay):
        """Every variable of every container is a setting."""
        for container in deployed(overlay):
            assert unknown(container.environment) == []

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_pods(self, overlay):
        """No root, nothing writable but volumes, which stay closed to the group, and probes of all three kinds."""
        for manifest in manifests(overlay):
            if manifest["kind"] != "StatefulSet":
                continue
            pod = manifest["spec"]["template"]["spec"]
            [container] = pod["containers"]
            assert pod["securityContext"]["runAsUser"] == 10001
            assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            [port] = [port["containerPort"] for port in container["ports"] if port["name"] == "grpc"]
            secured = overlay == "gpu-secured"
            command = [*health_command(container["name"])]
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = container[probe]["exec"]["command"] if secured else container[probe]["grpc"]["port"]
                assert asked == (command if secured else port)
            provided = {volume["name"] for volume in pod["volumes"]}
            provided |= {claim["metadata"]["name"] for claim in manifest["spec"].get("volumeClaimTemplates", ())}
            assert {mount["name"] for mount in container["volumeMounts"]} == provided

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_names_find_pods(self, overlay):
        """Services are headless and select the pods of their StatefulSet, at its port."""
        read = {(manifest["kind"], manifest["metadata"]["name"]): manifest["spec"] for manifest in manifests(overlay)}
        for role in ROLES:
            service, pods = read["Service", f"specpair-{role}"], read["StatefulSet", f"specpair-{role}"]
            assert service["clusterIP"] == "None"
            assert pods["serviceName"] == f"specpair-{role}"
            template = pods["template"]
            assert service["selector"] == template["metadata"]["labels"] == pods["selector"]["matchLabels"]
            assert read["PodDisruptionBudget", f"specpair-{role}"]["selector"]["matchLabels"] == service["selector"]
            [port], [container] = service["ports"], template["spec"]["containers"]
            assert port["port"] == container["ports"][0]["containerPort"]

    def test_the_autoscaler_reads_the_adapters_metric(self):
        """The name is the one that the example gives it."""
        [scaler] = [one for one in manifests("gpu") if one["kind"] == "HorizontalPodAutoscaler"]
        [rule] = yaml.safe_load((DEPLOY / "k8s/examples/prometheus-adapter.yaml").read_text())["rules"]["custom"]
        assert scaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]


class TestSettings:
    """What the services are started with."""

    def test_accepted(self, configuration):
        """Every container's environment and arguments make a configuration that listens for others, with JSON logs."""
        for container in containers():
            config = configuration(container)
            host, _, port = config.listen.partition(":")
            assert (host, int(port)) == ("0.0.0.0", {"target": 50051, "draft": 50052}[container.role]), container.where
            assert config.model, container.where
            assert config.log_format == "json", container.where
            assert bool(config.auth_tokens) == bool(config.tls_cert) == ("secured" in container.where), container.where

    def test_nobody_is_killed_in_the_grace(self, configuration):
        """SIGKILL comes well after the streams have had their time."""
        for container in containers():
            assert container.grace >= configuration(container).grace + 10, container.where

    def test_demo_models_lie_in_the_images(self):
        """What the demo is started with is where the image has it."""
        copied = {}
        for role in ROLES:
            for instruction, rest in instructions()[role]:
                if instruction == "COPY" and "models" in rest:
                    source, place = rest.split()
                    assert (ROOT / source / "model.safetensors").is_file()
                    copied[f"SPECPAIR_{role.upper()}_MODEL"] = place
        for container in [*deployed("cpu-demo"), *(one for one in composed() if "-cpu" in one.where)]:
            name = f"SPECPAIR_{container.role.upper()}_MODEL"
            assert container.environment[name] == copied[name], container.where

    def test_hub_variables_are_read(self):
        """Variables for the model hub are ones that its library knows."""
        text = Path(huggingface_hub.constants.__file__).read_text()
        given = {name for container in containers() for name in container.environment}
        given |= {name for role in ROLES for name in image_environment(role)}
        hub = [name for name in given if name.startswith("HF_") and name != "HF_TOKEN_FILE"]
        assert [name for name in hub if f'"{name}"' not in text] == []
        assert "HF_TOKEN_PATH" in hub
