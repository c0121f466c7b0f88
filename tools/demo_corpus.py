"""The text behind the demo pair: readable Python sources, cleaned, with whole modules held out.

Sources are the standard library of the running interpreter and a named list of installed packages, each taken only if
its own metadata declares a permissive licence. Cleaning keeps what a small model can learn from: code. Comments go,
docstrings shrink to their first line, and files that are mostly data are left out.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

HELD_OUT: tuple[str, ...] = (
    "calendar", "cmd", "configparser", "csv", "fractions", "graphlib", "heapq", "queue", "sched", "shlex",
    "statistics", "tempfile", "textwrap", "zipapp",
)  # fmt: skip
"""Standard library modules the models never see, under any file of that name."""

PACKAGES: tuple[str, ...] = (
    "anyio", "click", "filelock", "fsspec", "grpcio", "h11", "httpcore2", "httpx2", "huggingface_hub", "iniconfig",
    "Jinja2", "markdown-it-py", "MarkupSafe", "mpmath", "mypy", "networkx", "packaging", "pip", "pluggy",
    "pydantic", "pydantic-settings", "Pygments", "pytest", "python-dotenv", "PyYAML", "rich", "setuptools",
    "sortedcontainers", "structlog", "typer", "typing_extensions",
)  # fmt: skip
"""Installed packages to read from; one that is missing or not permissively licensed is skipped and reported."""

SKIPPED_DIRECTORIES = frozenset({
    "test", "tests", "testing", "idlelib", "encodings", "lib2to3", "pydoc_data", "turtledemo", "site-packages",
    "ensurepip", "__pycache__", "_vendor", "lexers", "styles", "distutils", "lib-dynload", "typeshed", "data",
})  # fmt: skip

PERMISSIVE = frozenset({
    "0BSD", "Apache", "Apache 2.0", "Apache 2.0 License", "Apache License 2.0", "Apache-2.0", "Apache Software License",
    "BSD", "BSD License", "3-Clause BSD License", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MIT License",
    "PSF-2.0", "Python Software Foundation License",
})  # fmt: skip


@dataclass(frozen=True)
class CorpusConfig:
    """Which sources are read and how much of each; sizes in bytes of cleaned text."""

    held_out: tuple[str, ...] = HELD_OUT
    packages: tuple[str, ...] = PACKAGES
    package_cap: int = 900_000
    smallest_file: int = 300
    largest_file: int = 150_000
    literal_share: float = 0.35
    longest_line: int = 160


@dataclass(frozen=True)
class Document:
    """One cleaned file: where it comes from (distribution), its path inside that, and its text."""

    source: str
    path: str
    text: str


@dataclass(frozen=True)
class Source:
    """One distribution that passed the licence check; files are (path inside it, path on disk)."""

    name: str
    version: str
    licence: str
    files: tuple[tuple[str, Path], ...]


@dataclass(frozen=True)
class Corpus:
    """Cleaned documents to train on, the held-out documents, and where all of them come from."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    sources: tuple[Source, ...]
    refused: tuple[str, ...]


def licence_of(meta: metadata.PackageMetadata) -> str:
    """The licence a distribution declares: its SPDX expression, else its classifiers, else its licence field."""
    expressions = meta.get_all("License-Expression")
    if expressions:
        return str(expressions[0])
    classifiers = [c.split("::")[-1].strip() for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    named = [str(value) for value in meta.get_all("License") or ["unknown"]]
    return " AND ".join(classifiers) or named[0].strip().splitlines()[0]


def is_permissive(licence: str) -> bool:
    """True if every licence named in the expression is on the permissive list."""
    parts = [part.strip(" ()") for part in re.split(r"\b(?:AND|OR|WITH)\b", licence)]
    return all(part in PERMISSIVE for part in parts)


def standard_library() -> Source:
    """The pure-Python standard library of the running interpreter."""
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple((str(path.relative_to(root)), path) for path in sorted(root.rglob("*.py")))
    return Source("python", sysconfig.get_python_version(), "PSF-2.0", files)


def installed_sources(names: Iterable[str]) -> tuple[list[Source], list[str]]:
    """The named distributions that are permissively licensed, and a line for each one that was refused."""
    taken, refused = [], []
    for name in names:
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            refused.append(f"{name}: not installed")
            continue
        licence = licence_of(found.metadata)
        if not is_permissive(licence):
            refused.append(f"{name}: {licence}")
            continue
        paths = sorted(str(file) for file in found.files or [] if str(file).endswith(".py"))
        files = tuple((path, Path(str(found.locate_file(path)))) for path in paths)
        taken.append(Source(name, found.version, licence, files))
    return taken, refused


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Every docstring node in a parsed file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value


def _summary(docstring: str) -> str:
    """A docstring's first line as a one-line docstring, without characters that would need escapes."""
    lines = docstring.strip().splitlines()
    line = lines[0].replace("\\", "").replace('"', "'").strip() if lines else ""
    return f'"""{line}"""' if line else '"""."""'


def shorten_docstrings(text: str) -> str:
    """Replaces each docstring that spans lines by its first line; long prose teaches a small model no code."""
    lines = text.splitlines()
    for node in sorted(_docstrings(ast.parse(text)), key=lambda node: -node.lineno):
        if node.end_lineno is None or node.end_lineno == node.lineno:
            continue
        head = lines[node.lineno - 1].encode()[: node.col_offset].decode()
        tail = lines[node.end_lineno - 1].encode()[node.end_col_offset or 0 :].decode()
        lines[node.lineno - 1 : node.end_lineno] = [head + _summary(str(node.value)) + tail]
    return "\n".join(lines) + "\n"


def strip_comments(text: str) -> str:
    """Removes comments, and with a comment that stood alone its whole line."""
    lines: list[str | None] = list(text.splitlines())
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start[0] - 1, token.start[1]
            code = (lines[row] or "")[:column].rstrip()
            lines[row] = code or None
    return "\n".join(line for line in lines if line is not None) + "\n"


def tidy_blank_lines(text: str) -> str:
    """Trailing spaces go, tabs become spaces, and runs of blank lines shrink to two at most."""
    text = re.sub(r"[ \t]+$", "", text.expandtabs(8), flags=re.MULTILINE)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


def literal_share(text: str) -> float:
    """The share of a file's characters that stand in string and number literals."""
    literal = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.NUMBER):
            literal += len(token.string)
    return literal / max(1, len(text))


def clean(text: str) -> str | None:
    """A file's text with comments, long docstrings and layout noise gone; None if it is not valid Python 3."""
    try:
        cleaned = tidy_blank_lines(strip_comments(shorten_docstrings(text)))
        ast.parse(cleaned)
    except (SyntaxError, ValueError, tokenize.TokenError):
        return None
    return cleaned


def _wanted(path: str, config: CorpusConfig) -> bool:
    """False for files of held-out modules' names, tests, generated tables and protocol stubs."""
    parts = Path(path).parts
    stem = Path(path).stem
    if SKIPPED_DIRECTORIES.intersection(parts[:-1]) or stem.startswith(("test_", "_sysconfigdata")):
        return False
    return stem not in config.held_out and not stem.endswith(("_pb2", "_pb2_grpc"))


def _readable(text: str, config: CorpusConfig) -> bool:
    """False for files that are tiny, huge, or mostly data."""
    if not config.smallest_file <= len(text) <= config.largest_file:
        return False
    if max(map(len, text.splitlines())) > config.longest_line:
        return False
    return literal_share(text) <= config.literal_share


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 40}


def _read(path: Path) -> str | None:
    try:
        return clean(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _documents(source: Source, config: CorpusConfig, cap: int | None) -> Iterator[Document]:
    """A source's cleaned files, at most `cap` bytes of them, in an order that does not depend on their names."""
    spent = 0
    for path, location in sorted(source.files, key=lambda file: hashlib.sha256(file[0].encode()).hexdigest()):
        if not _wanted(path, config):
            continue
        text = _read(location)
        if text is None or not _readable(text, config) or (cap is not None and spent + len(text) > cap):
            continue
        spent += len(text)
        yield Document(source.name, path, text)


def _held_out_documents(library: Source, config: CorpusConfig) -> list[Document]:
    """The held-out standard library modules, cleaned as the training text is."""
    wanted = {f"{name}.py" for name in config.held_out}
    texts = ((path, _read(location)) for path, location in library.files if path in wanted)
    return [Document(library.name, path, text) for path, text in texts if text is not None]


def build_corpus(config: CorpusConfig) -> Corpus:
    """Reads, cleans and deduplicates every source; files that copy a held-out module in part are left out too."""
    library = standard_library()
    installed, refused = installed_sources(config.packages)
    held_out = _held_out_documents(library, config)
    guarded = set().union(*(_long_lines(document.text) for document in held_out))
    seen: set[str] = set()
    train: list[Document] = []
    for source in [library, *installed]:
        for document in _documents(source, config, None if source is library else config.package_cap):
            lines = _long_lines(document.text)
            digest = hashlib.sha256(document.text.encode()).hexdigest()
            if digest in seen or (len(lines & guarded) > 8 and len(lines & guarded) > 0.05 * len(lines)):
                continue
            seen.add(digest)
            train.append(document)
    return Corpus(tuple(train), tuple(held_out), (library, *installed), tuple(refused))
