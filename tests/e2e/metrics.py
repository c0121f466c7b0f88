"""Metrics of running services, as Prometheus reads them."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def address(service):
    """HOST:PORT of the metrics of a healthy service that was started with --metrics-listen."""
    assert service.address
    return next(entry["address"] for entry in service.entries() if entry["event"] == "serving metrics")


class Scrape:
    """What one look at a service's metrics has shown."""

    def __init__(self, place):
        # A proxy that the surroundings name is not for loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{place}/metrics", timeout=10) as response:
            assert response.status == 200
            self.families = list(text_string_to_metric_families(response.read().decode()))
        self.samples = [sample for family in self.families for sample in family.samples]

    @classmethod
    def of(cls, service):
        """A service's metrics, now."""
        return cls(address(service))

    @property
    def names(self):
        """Names of the project's own families, as PromQL has them."""
        counted = {f"{family.name}_total" if family.type == "counter" else family.name for family in self.families}
        return {name for name in counted if name.startswith("specpair_")}

    def value(self, name, **labels):
        """The sum of the samples with this very name that have these labels."""
        found = [
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(found)

    def by(self, label, name):
        """The values of a metric by one of its labels, those that are 0 left out."""
        values = {sample.labels[label] for sample in self.samples if sample.name == name}
        return {value: self.value(name, **{label: value}) for value in values if self.value(name, **{label: value})}
