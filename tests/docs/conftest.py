"""The site, built once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .pages import ROOT, Built


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of the site, and what mkdocs said while it built it strictly."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    return folder, done


@pytest.fixture(scope="session")
def site(built):
    """Every page of the site by its path; mkdocs writes them also where it finds something wrong."""
    folder, done = built
    assert (folder / "index.html").exists(), done.stderr
    return {path.relative_to(folder).as_posix(): Built(path) for path in sorted(folder.rglob("*.html"))}
