"""What tests of several directories share."""

from __future__ import annotations

import pytest

from .tiny import TinyModels


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Tiny random models, each made when it is first asked for."""
    return TinyModels(tmp_path_factory.mktemp("tiny"))
