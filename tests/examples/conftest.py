"""Services for the examples: the demo pair, its target with a chat template; a replica of that with a single slot; and
a pair with TLS and tokens. Tests may kill a target: who needs it next starts it again."""

from __future__ import annotations

import shutil

import pytest

from ..e2e.conftest import launch, pytest_runtest_makereport  # noqa: F401 - pytest finds them here
from ..e2e.processes import DEMO
from ..e2e.test_security import Secured
from ..e2e.test_turns import TEMPLATE

_LENGTH = "--max-length=512"
# A target that is told to stop leaves its sessions little time to finish.
_TARGET = [_LENGTH, "--grace=0.2"]


@pytest.fixture(scope="session")
def conversing(tmp_path_factory):
    """The demo target's directory with a chat template."""
    model = tmp_path_factory.mktemp("conversing") / "target"
    shutil.copytree(DEMO / "target", model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


@pytest.fixture(scope="session")
def _target(launch, conversing):  # noqa: F811
    return launch("target", f"--model={conversing}", "--slots=4", *_TARGET)


@pytest.fixture(scope="session")
def _replica(launch, conversing):  # noqa: F811
    return launch("target", f"--model={conversing}", "--slots=1", "--queue-timeout=0.2", *_TARGET)


@pytest.fixture(scope="session")
def draft(launch):  # noqa: F811
    """The draft that all examples have."""
    return launch("draft", f"--model={DEMO / 'draft'}", "--slots=8", _LENGTH)


@pytest.fixture(scope="session")
def secured(launch, tmp_path_factory):  # noqa: F811
    """A pair with mutual TLS and tokens."""
    return Secured(launch, tmp_path_factory.mktemp("secured"))


def _alive(service):
    if not service.alive:
        service.restart()
    assert service.address
    return service


@pytest.fixture
def target(_target):
    """The target that all examples have."""
    return _alive(_target)


@pytest.fixture
def replica(_replica):
    """A target that computes the same and is soon full."""
    return _alive(_replica)
