"""A copy of the project, as a newcomer has it after `make venv`, and the services that its documentation starts."""

from __future__ import annotations

import pytest

from ..e2e.conftest import launch, pytest_runtest_makereport  # noqa: F401 - pytest finds them here
from .place import Place


@pytest.fixture(scope="session")
def place(launch, tmp_path_factory):  # noqa: F811
    """Where the documentation is followed."""
    place = Place(tmp_path_factory.mktemp("newcomer"), launch)
    yield place
    place.close()
