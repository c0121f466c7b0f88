"""What tests of several directories share."""

from __future__ import annotations

import signal

import hypothesis
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

# How long an example takes says nothing on a busy machine.
hypothesis.settings.register_profile("specpair", deadline=None)
hypothesis.settings.load_profile("specpair")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Tiny random models, each made when it is first asked for."""
    from .tiny import TinyModels  # loads torch, which most tests of the client do without

    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """A shell starts background jobs with SIGINT ignored, and children inherit that: those of tests must not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def exporter():
    """Holds the spans that have ended."""
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter):
    """A tracer provider whose spans go there at once."""
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    yield made
    made.shutdown()
