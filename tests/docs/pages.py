"""Built pages, and Markdown, as tests look at them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
_LINK = re.compile(r"\[(?:`[^`]*`|[^\]`])*\]\(([^)\s]+)\)")


def documents() -> list[Path]:
    """The Markdown files that people read: those in docs/, and those that stand beside what they are about."""
    beside = [
        *ROOT.glob("*.md"),
        ROOT / "bench/README.md",
        ROOT / "models/demo/README.md",
        *ROOT.glob("examples/**/*.md"),
    ]
    return sorted(path for path in [*ROOT.glob("docs/**/*.md"), *beside] if "node_modules" not in path.parts)


def links(markdown: str) -> list[str]:
    """Targets of links and images, code left out."""
    return _LINK.findall(re.sub(r"(?<!\[)`[^`\n]+`", "", FENCED.sub("", markdown)))


@dataclass
class Built(HTMLParser):
    """What a page links to, loads and shows."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    undescribed: list[str] = field(default_factory=list)
    """Images without a text in their place."""
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text())

    def handle_starttag(self, tag, attributes):
        has = {name: value or "" for name, value in attributes}
        if "id" in has:
            self.ids.add(has["id"])
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        if tag == "link" and has.get("rel") in {"stylesheet", "preconnect", "preload", "icon"}:
            self.loads.append(has["href"])
        if tag in {"script", "img", "iframe", "source"} and "src" in has:
            self.loads.append(has["src"])
        if tag == "img" and not has.get("alt", "").strip():
            self.undescribed.append(has.get("src", ""))

    def handle_data(self, data):
        self.texts.append(data)

    @cached_property
    def text(self) -> str:
        """All text, with single spaces between words."""
        return " ".join("".join(self.texts).split())
