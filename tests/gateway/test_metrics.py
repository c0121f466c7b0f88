"""What the gateway counts."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from specpair_gateway.app import create_app
from specpair_gateway.config import GatewayConfig
from specpair_gateway.metrics import RequestMetrics

from ..client.fakes import FakeTarget
from ..deploy.exported import exported, registries
from ..e2e.metrics import Scrape
from ..e2e.processes import Service, wait_for
from .serving import COMPLETIONS, ask, client_of, completion


def value(registry, endpoint, status):
    """How many requests ended so; None if none did."""
    return registry.get_sample_value("specpair_gateway_requests_total", {"endpoint": endpoint, "status": str(status)})


def test_requests_by_endpoint_and_status():
    """Answers and refusals are counted under their endpoint; paths and models that callers make up are no labels."""
    registry = CollectorRegistry()
    app = create_app(GatewayConfig(), client_of(FakeTarget()), RequestMetrics(registry))
    assert ask(app, COMPLETIONS, completion()).status_code == 200
    assert ask(app, COMPLETIONS, completion(temprature=1)).status_code == 400
    for path in ("/evil", "/v1/evil", "/v1/completions/evil"):
        assert ask(app, path).status_code == 404
    ask(app, "/v1/models/evil")
    assert value(registry, COMPLETIONS, 200) == value(registry, COMPLETIONS, 400) == 1
    assert value(registry, "other", 404) == 3
    assert value(registry, "/v1/models", 404) == 1
    assert registry.get_sample_value("specpair_gateway_request_duration_seconds_count", {"endpoint": COMPLETIONS}) == 2
    labels = [sample.labels for family in registry.collect() for sample in family.samples]
    assert "evil" not in str(labels)


@pytest.fixture
def gateway(tmp_path):
    """A gateway process in front of nothing, whose metrics have an address of their own."""
    flags = ("--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", "--target=127.0.0.1:1", "--draft=ngram")
    service = Service("gateway", tmp_path / "log", *flags, listen=False)
    yield service
    assert service.stop() == 0


def test_the_process_serves_them(gateway):
    """The listener has the gateway's own metrics and its client's, and API's address has none."""

    def place(event):
        return next((entry["address"] for entry in gateway.entries() if entry["event"] == event), None)

    def counted():
        scraped = Scrape(place("serving metrics"))
        other = scraped.value("specpair_gateway_requests_total", endpoint="other", status="404")
        return scraped if other == 1 else None

    api = wait_for(lambda: place("listening"), 60, "the gateway listens")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path in ("/v1/models", "/metrics"):
        with pytest.raises(urllib.error.HTTPError):
            opener.open(f"http://{api}{path}", timeout=30)
    # A request is counted once its answer is on its way.
    scraped = wait_for(counted, 30, "both requests are counted")
    assert scraped.names == set(exported(registries()["gateway"]))
    assert scraped.value("specpair_gateway_requests_total", endpoint="/v1/models", status="503") == 1
    assert scraped.value("specpair_client_resumes_total") == 0
