"""Dashboard, alerts, autoscaling and documentation name metrics that exist; and every metric is documented."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml
from prometheus_client import CollectorRegistry

from specpair_runtime.serving.calls import Calls
from specpair_runtime.serving.metrics import CallMetrics

from .exported import asked_for, exported, registries
from .files import DEPLOY, OVERLAYS, ROLES, ROOT, composed, deployed, manifests

PROMETHEUS = DEPLOY / "prometheus"
DOCS = ROOT / "docs"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/specpair.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = [
    rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
PORT = 9464


@pytest.fixture(scope="module")
def metrics():
    """Every metric of every process, with its type."""
    return {name: kind for registry in registries().values() for name, kind in exported(registry).items()}


@pytest.fixture(scope="module")
def named(metrics):
    """The metrics that a text names."""
    histograms = {name for name, kind in metrics.items() if kind == "histogram"}
    return lambda text: asked_for(text, histograms)


def queries():
    """Every expression of the dashboard, the alerts and the example for the autoscaler, with where it stands."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
    for alert in ALERTS:
        yield f"alert {alert['alert']}", alert["expr"]
    adapter = yaml.safe_load((DEPLOY / "k8s/examples/prometheus-adapter.yaml").read_text())
    for rule in adapter["rules"]["custom"]:
        yield "adapter", f"{rule['seriesQuery']} {rule['metricsQuery']}"


def promtool(place, *arguments):
    """Prometheus' own tool has nothing against what it is asked about, where it is installed."""
    if program := shutil.which("promtool"):
        done = subprocess.run(
            [program, *arguments], cwd=place, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


class TestNames:
    """Names of metrics, wherever they stand."""

    @pytest.mark.parametrize(("where", "query"), list(queries()))
    def test_queries_ask_for_what_exists(self, where, query, metrics, named):
        """A query of the project's own metrics finds something, however it is written."""
        own = named(query) - {"specpair_slot_use"}
        assert own or "up{" in query or "process_" in query, where
        assert own <= set(metrics), where

    def test_every_metric_is_documented(self, metrics):
        """docs/observability.md has a line for each, and none for another one."""
        text = (DOCS / "observability.md").read_text()
        assert set(re.findall(r"^\| `(specpair_\w+)` \|", text, flags=re.MULTILINE)) == set(metrics)

    def test_documented_labels(self):
        """The labels of a documented metric are those that it has."""
        text = (DOCS / "observability.md").read_text()
        rows = re.findall(r"^\| `(specpair_\w+)` \|([^|]*)\|", text, flags=re.MULTILINE)
        documented = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
        for registry in registries().values():
            for family in registry.collect():
                for sample in family.samples:
                    name = re.sub(r"_(bucket|sum|count)$", "", sample.name)
                    if sample.name.startswith("specpair_") and name != "specpair_info":
                        assert set(sample.labels) - {"le"} == documented[name], name

    @pytest.mark.parametrize("name", ["observability.md", "runbook.md", "deployment.md", "operation.md", "security.md"])
    def test_documents_name_what_exists(self, name, metrics, named):
        """A metric that a page names exists."""
        variables = {"specpair_slot_use", "specpair_runtime", "specpair_target", "specpair_draft", "specpair_gateway"}
        assert named((DOCS / name).read_text()) - variables <= set(metrics)

    def test_histograms_are_asked_by_their_series(self, metrics):
        """No query asks for a histogram without saying which of its series."""
        bare = {name for name, kind in metrics.items() if kind == "histogram"}
        for where, query in queries():
            assert not bare & set(re.findall(r"\bspecpair_\w+", query)), where


class TestAlerts:
    """deploy/prometheus/alerts.yml and its runbook."""

    def test_each_has_a_section(self):
        """The runbook has a section for each alert, in their order, with what it means and what to do."""
        text = (DOCS / "runbook.md").read_text()
        sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
        assert [section.splitlines()[0] for section in sections] == [alert["alert"] for alert in ALERTS]
        for section in sections:
            assert "**Means**" in section
            assert re.search(r"\*\*do\*\*", section, flags=re.IGNORECASE)

    @pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
    def test_each_says_what_it_is(self, alert):
        """It has a severity, one line for people, and the address of its section."""
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert alert["annotations"]["summary"]
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"

    def test_panels_of_the_runbook(self):
        """Panels that the runbook sends people to are in the dashboard."""
        text = " ".join((DOCS / "runbook.md").read_text().split())
        titles = {panel["title"] for panel in PANELS}
        emphasized = set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", text))
        assert {name for name in emphasized if not any(title.startswith(name) for title in titles)} == set()
        assert len(emphasized) > 10

    def test_first_errors_are_seen(self):
        """Calls whose increase is an alert, by status, are 0 before the first: a series that begins at 1 has none."""
        registry = CollectorRegistry()
        CallMetrics(registry, Calls()).know(["specpair.v1.TargetService"])
        counted = [re.findall(r'increase\(specpair_requests_total\{code=~"([^"]+)"', one["expr"]) for one in ALERTS]
        codes = {code for found in counted for pattern in found for code in pattern.split("|")}
        assert codes >= {"INTERNAL", "UNKNOWN"}
        for code in codes:
            labels = {"method": "TargetService/Verify", "code": code}
            assert registry.get_sample_value("specpair_requests_total", labels) == 0, code

    @pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
    def test_each_is_tried(self, alert):
        """promtool's tests have one in which it fires."""
        tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
        tried = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
        assert alert["alert"] in tried

    def test_promtool(self):
        """Prometheus takes configuration and rules, and the rules fire when they should."""
        if shutil.which("promtool") is None:
            pytest.skip("promtool is not installed")
        promtool(PROMETHEUS, "check", "config", "prometheus.yml")
        promtool(PROMETHEUS, "test", "rules", "alerts_test.yml")


class TestDashboard:
    """deploy/grafana/dashboards/specpair.json."""

    def test_places(self):
        """Panels have numbers of their own and lie on Grafana's 24 columns without covering each other."""
        assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
        taken = set()
        for panel in DASHBOARD["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not cells & taken, panel["title"]
            assert all(x < 24 for x, _ in cells), panel["title"]
            taken |= cells

    def test_rows(self):
        """What there is to see, in this order."""
        rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
        assert rows == ["Throughput", "Acceptance", "Latency by stage", "Slots and queue", "Failures"]

    def test_source(self):
        """Everything asks the data source that is provisioned, of the instances that are chosen."""
        provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
        uid = provisioned["datasources"][0]["uid"]
        for panel in PANELS:
            assert panel["description"], panel["title"]
            for target in panel["targets"]:
                assert target["datasource"]["uid"] == uid
                assert 'instance=~"$instance"' in target["expr"], panel["title"]


class TestScraping:
    """Where metrics are served is where they are looked for."""

    def test_compose(self):
        """Each service serves metrics at the port that Prometheus asks, and Prometheus has the files that it names."""
        configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        for container in composed():
            listen = container.environment[f"SPECPAIR_{container.role.upper()}_METRICS_LISTEN"]
            assert listen == f"0.0.0.0:{PORT}", container.where
            targets = [job["static_configs"][0]["targets"] for job in configuration["scrape_configs"]]
            assert [f"{container.role}:{PORT}"] in targets
        mounted = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]["volumes"]
        for name in ("prometheus.yml", *configuration["rule_files"]):
            assert f"./deploy/prometheus/{name}:/etc/prometheus/{name}:ro" in mounted

    def test_optional_jobs(self, tmp_path):
        """Clients and gateways are jobs in comments, which Prometheus takes once somebody takes the comments away."""
        text = (PROMETHEUS / "prometheus.yml").read_text()
        whole = re.sub(r"^  #([- ] )", r"  \1", text, flags=re.MULTILINE)
        jobs = {job["job_name"] for job in yaml.safe_load(whole)["scrape_configs"]}
        assert jobs == {*(f"specpair-{one}" for one in (*ROLES, "client", "gateway")), "prometheus"}
        (tmp_path / "alerts.yml").write_text((PROMETHEUS / "alerts.yml").read_text())
        (tmp_path / "prometheus.yml").write_text(whole)
        promtool(tmp_path, "check", "config", "prometheus.yml")

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_names_of_jobs_in_kubernetes(self, overlay, tmp_path):
        """Both examples find every pod at its port of metrics, and call the job what alerts and Compose call it."""
        monitor = yaml.safe_load((DEPLOY / "k8s/examples/pod-monitor.yaml").read_text())["spec"]
        [endpoint] = monitor["podMetricsEndpoints"]
        [monitored] = endpoint["relabelings"]
        [scraped] = yaml.safe_load((DEPLOY / "k8s/examples/prometheus-scrape.yaml").read_text())["scrape_configs"]
        *_, last = scraped["relabel_configs"]
        assert monitored["sourceLabels"] == last["source_labels"]
        assert monitored["sourceLabels"] == ["__meta_kubernetes_pod_label_app_kubernetes_io_component"]
        assert monitored["targetLabel"] == last["target_label"] == "job"
        pods = [one["spec"]["template"] for one in manifests(overlay) if one["kind"] == "StatefulSet"]
        named = set()
        for pod in pods:
            labels = pod["metadata"]["labels"]
            assert monitor["selector"]["matchLabels"].items() <= labels.items()
            assert endpoint["port"] in [port["name"] for port in pod["spec"]["containers"][0]["ports"]]
            for replacement in (monitored["replacement"], last["replacement"]):
                named.add(replacement.replace("$1", labels["app.kubernetes.io/component"]))
        assert named == {f"specpair-{role}" for role in ROLES}
        # Debian's promtool is built without Kubernetes: everything but where pods are found.
        del scraped["kubernetes_sd_configs"]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [scraped]}))
        promtool(tmp_path, "check", "config", "prometheus.yml")

    def test_ports_are_not_published(self):
        """Metrics have no password: no port of a service but that of gRPC leaves its network."""
        services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        for role in ROLES:
            for name in (role, f"{role}-cpu"):
                assert not [port for port in services[name]["ports"] if str(PORT) in port], name

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_kubernetes(self, overlay):
        """Pods serve metrics at the port that their annotations and the network policy name."""
        for container in deployed(overlay):
            listen = container.environment[f"SPECPAIR_{container.role.upper()}_METRICS_LISTEN"]
            assert listen == f"0.0.0.0:{PORT}", container.where
        for manifest in manifests(overlay):
            if manifest["kind"] == "StatefulSet":
                template = manifest["spec"]["template"]
                assert template["metadata"]["annotations"]["prometheus.io/port"] == str(PORT)
                [container] = template["spec"]["containers"]
                assert {"name": "metrics", "containerPort": PORT} in container["ports"]
            if manifest["kind"] == "NetworkPolicy" and manifest["metadata"]["name"] == "specpair":
                [scraping] = [rule for rule in manifest["spec"]["ingress"] if {"port": PORT} in rule["ports"]]
                assert len(scraping["ports"]) == len(scraping["from"]) == 1
                assert "namespaceSelector" in scraping["from"][0]
