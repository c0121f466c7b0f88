"""The documents as they stand in the repository."""

from __future__ import annotations

import ast
import re
from textwrap import dedent
from urllib.parse import urlsplit

import pytest

import specpair
from specpair.bench.theory import Costs, serial_speedup

from .pages import FENCED, ROOT, documents, links

DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in documents()]
# What a model has generated is no example.
EXAMPLES = [document for document in DOCUMENTS if document != "models/demo/README.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_hold_in_the_repository(document):
    """Every relative link of a document leads to a file or folder beside it, without a site."""
    path = ROOT / document
    targets = [urlsplit(link) for link in links(path.read_text())]
    local = [target.path for target in targets if not target.scheme and target.path]
    assert [target for target in local if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("document", EXAMPLES)
def test_examples_are_python(document):
    """Python in documents parses, and what it imports from specpair is public."""
    for language, code in FENCED.findall((ROOT / document).read_text()):
        if language != "python":
            continue
        tree = compile(dedent(code), document, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        modules = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "specpair"]
        names = {alias.name for node in modules for alias in node.names}
        assert names <= set(specpair.__all__)


def test_gains_of_a_draft_are_what_the_theory_says():
    """The table in choosing-a-draft.md has the best draft length up to 7 for each acceptance and cost, and its gain."""
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "docs/choosing-a-draft.md").read_text().splitlines()]
    head = next(line for line in lines if line[0] == "a")
    rows = [line for line in lines if re.fullmatch(r"0\.\d", line[0])]
    assert (len(head), len(rows)) == (6, 6)
    for acceptance, *cells in rows:
        for cost, cell in zip(head[1:], cells, strict=True):
            costs = Costs(plain=1.0, draft=float(cost.removeprefix("c = ")), verify=1.0, round_trip=0.1)
            gains = {length: serial_speedup(float(acceptance), length, costs) for length in range(1, 8)}
            best = max(gains, key=gains.__getitem__)
            assert cell == f"{gains[best]:.2f} ({best})"
