"""Generates the committed gRPC stubs: `python tools/generate_stubs.py [--output DIR]`.

Writes `specpair/v1/*_pb2.py`, `*_pb2_grpc.py` and the typed `.pyi` files below DIR (default: client).
"""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc


def generate(output: Path) -> None:
    """Runs protoc over all protos; raises RuntimeError when it fails."""
    root = Path(__file__).resolve().parent.parent / "protos"
    protos = sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))
    arguments = [
        "protoc",
        f"-I{root}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={output}",
        f"--grpc_python_out={output}",
        f"--mypy_out=quiet:{output}",
        f"--mypy_grpc_out=quiet:{output}",
        *protos,
    ]
    # protoc finds the mypy plugins beside the interpreter.
    plugins = Path(sys.executable).parent
    arguments[1:1] = [
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed")
    (output / "specpair" / "v1" / "__init__.py").write_text('"""Generated from protos/specpair/v1; never edited."""\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "client")
    generate(parser.parse_args().output)
