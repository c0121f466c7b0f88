"""Prints what pyproject.toml in the current directory requires, with the extras that are named, one to a line.

An image installs these in a layer of their own, which stands as long as they do, whatever changes in the sources.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path


def requirements(extras: Iterable[str]) -> list[str]:
    """Requirements of the project and of its extras, in order and each once; extras of extras are followed.

    Raises KeyError for an extra that the project does not have.
    """
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
    own = f"{project['name']}["
    found = dict.fromkeys(project["dependencies"])
    pending = list(extras)
    followed = set()
    while pending:
        extra = pending.pop(0)
        if extra in followed:
            continue
        followed.add(extra)
        for requirement in project["optional-dependencies"][extra]:
            if requirement.startswith(own):
                pending += requirement.removeprefix(own).rstrip("]").split(",")
            else:
                found.setdefault(requirement)
    return list(found)


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
