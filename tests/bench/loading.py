"""Scripts of bench/ and tools/ as modules, for tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # for dataclasses, and for the scripts that import it
    spec.loader.exec_module(module)
    return module


@contextmanager
def scripts(*names: str) -> Iterator[dict[str, ModuleType]]:
    """Modules by plain name, as Python lets scripts import each other: each is given after what it imports."""
    paths = [ROOT / f"{name}.py" for name in names]
    try:
        yield {path.stem: _load(path) for path in paths}
    finally:
        for path in paths:
            sys.modules.pop(path.stem, None)
