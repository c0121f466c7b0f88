"""What mkdocs does not do by itself: pages from outside docs/, and links that hold in the repository and in the site.

Documents link to each other and to whatever else is in the repository by relative paths, as the repository shows them.
The site has all of that: a document beside docs/ is a page (`extra.documents` in mkdocs.yml says where, if it is one
for the navigation), a proto file is its reference, other text is shown as a page with its source, a folder as the list
of its files, and the rest is copied. A path that leads nowhere is left as it stands, so that mkdocs reports it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import protocol
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Fenced and inline code is skipped; of a link or an image, what is in the brackets and the target.
_CODE_OR_LINK = re.compile(
    r"^ *```.*?^ *```|`[^`]+`|(?P<text>\[(?:`[^`]*`|[^\]`])*\])\((?P<link>[^)\s]+)\)", re.M | re.S
)
# Where the site has what is not in docs/.
_OUTSIDE = "repository/"
_CONTENTS = "contents.md"
_SOURCE = ".source.md"
_AS_THEY_ARE = {".json", ".jsonl", ".md", ".png", ".svg"}
_LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml"}


def on_config(config: MkDocsConfig) -> None:
    """Puts the pages of a folder in place of its path in the navigation."""
    config.nav = list(_expanded(config.nav or [], Path(config.docs_dir)))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the protocol reference, the documents outside of docs/, and whatever pages link to."""
    root = _root(config)
    for name, content in protocol.pages(root / "protos").items():
        files.append(File.generated(config, f"protocol/{name}", content=content))
    for path in config.extra["documents"]:
        files.append(File.generated(config, _place(path, config), content=(root / path).read_text()))
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for link in _links(page.content_string):
            path = _resolved(link, page.src_uri, config)
            if path is None or files.get_file_from_path(_place(path, config)) is not None:
                continue
            added = _shown(path, config)
            files.append(added)
            if _has_links(added):
                waiting.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns paths within the repository into paths within the site."""
    if not _has_links(page.file):
        return markdown

    def rewritten(found: re.Match[str]) -> str:
        path = _resolved(found["link"], page.file.src_uri, config) if found["link"] else None
        if path is None:
            return found[0]
        fragment = urlsplit(found["link"]).fragment
        place = os.path.relpath(_place(path, config), PurePosixPath(page.file.src_uri).parent)
        return f"{found['text']}({place}{'#' * bool(fragment)}{fragment})"

    return _CODE_OR_LINK.sub(rewritten, markdown)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


def _expanded(nav: list[Any], docs: Path) -> Iterator[Any]:
    for item in nav:
        match item:
            case str(path) if path.endswith("/"):
                yield from sorted(file.relative_to(docs).as_posix() for file in (docs / path).glob("[0-9]*.md"))
            case dict():
                yield {title: list(_expanded(below, docs)) if isinstance(below, list) else below
                       for title, below in item.items()}  # fmt: skip
            case _:
                yield item


def _has_links(file: File) -> bool:
    """Whether links on a page are paths of the repository: in the reference they are of the site, in a source code."""
    return file.is_documentation_page() and not (file.src_uri.startswith("protocol/") or file.src_uri.endswith(_SOURCE))


def _links(markdown: str) -> Iterator[str]:
    yield from (found["link"] for found in _CODE_OR_LINK.finditer(markdown) if found["link"])


def _resolved(link: str, src_uri: str, config: MkDocsConfig) -> str | None:
    """The path within the repository that a page's link leads to; None for an address, a fragment, or no such path."""
    address = urlsplit(link)
    if address.scheme or address.netloc or not address.path:
        return None
    origins = {page: path for path, page in config.extra["documents"].items()}
    origin = origins.get(src_uri) or _origin(src_uri)
    root = _root(config).resolve()
    path = (root / origin).parent.joinpath(address.path).resolve()
    return path.relative_to(root).as_posix() if path.exists() and path.is_relative_to(root) else None


def _origin(src_uri: str) -> str:
    """Where in the repository a page of the site comes from."""
    return src_uri.removeprefix(_OUTSIDE) if src_uri.startswith(_OUTSIDE) else f"docs/{src_uri}"


def _place(path: str, config: MkDocsConfig) -> str:
    """Where in the site a path of the repository is."""
    if path in config.extra["documents"]:
        return config.extra["documents"][path]
    if path.endswith(".proto"):
        return f"protocol/{PurePosixPath(path).stem}.md"
    if path.startswith("docs/") and (_root(config) / path).is_file():
        return path.removeprefix("docs/")
    if (_root(config) / path / "README.md").is_file():
        return _place(f"{path}/README.md", config)
    if (_root(config) / path).is_dir():
        return f"{_OUTSIDE}{path}/{_CONTENTS}"
    return f"{_OUTSIDE}{path}" if PurePosixPath(path).suffix in _AS_THEY_ARE else f"{_OUTSIDE}{path}{_SOURCE}"


def _shown(path: str, config: MkDocsConfig) -> File:
    """A file or folder of the repository, for the site. Sources are not searched: they would crowd out documents."""
    place, full = _place(path, config), _root(config) / path
    unlisted = "---\nsearch:\n  exclude: true\n---\n"
    if full.is_dir():
        listed = "\n".join(f"* [{name}]({name})" for name in _names(full))
        return File.generated(config, place, content=f"{unlisted}# {path}\n\n{listed}\n")
    if place.endswith(_SOURCE):
        language = _LANGUAGES.get(full.suffix, "dockerfile" if full.name == "Dockerfile" else "text")
        # More backticks than any text of the file has.
        content = f"{unlisted}# {path}\n\n``````{language}\n{full.read_text()}``````\n"
        return File.generated(config, place, content=content)
    return File.generated(config, place, abs_src_path=str(full))


def _names(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.iterdir() if not path.name.startswith((".", "__pycache__", "node_modules"))
    )
