"""The documentation's site: complete, nothing dead in it, nothing in it from elsewhere."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from .pages import ROOT


def test_the_site_builds_strictly(built):
    """mkdocs builds it without a warning: no dead link or anchor, no page that the navigation leaves out."""
    _, done = built
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def test_every_document_can_be_reached(site):
    """Each document in docs/ is a page, and the navigation of the first page links to it."""
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in ROOT.glob("docs/**/*.md")}
    expected = {f"{page.parent}/index.html" if page.name == "README" else f"{page}.html" for page in pages}
    assert len(expected) > 20
    assert expected - set(site) == set()
    assert expected - {urlsplit(link).path for link in site["index.html"].links} == set()


def test_links_of_built_pages_lead_somewhere(site, built):
    """Every link within the site leads to a file of it, and every fragment to an element that is there."""
    folder, _ = built
    dead = []
    for name, page in site.items():
        if name == "404.html":
            continue
        for link in [*page.links, *page.loads]:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (page.path.parent / unquote(address.path)).resolve() if address.path else page.path
            target = target / "index.html" if target.is_dir() else target
            there = site.get(target.relative_to(folder).as_posix()) if target.is_relative_to(folder) else None
            fragment = unquote(address.fragment)
            known = not fragment or fragment.startswith("__") or (there is not None and fragment in there.ids)
            if not target.exists() or not known:
                dead.append(f"{name}: {link}")
    assert dead == []


def test_nothing_comes_from_elsewhere(site, built):
    """Scripts, styles, fonts and images are the site's own: reading it tells nobody, and it reads without a network."""
    folder, _ = built
    foreign = re.compile(r"^(https?:)?//")
    assert [f"{name}: {link}" for name, page in site.items() for link in page.loads if foreign.match(link)] == []
    styles = [
        path for path in folder.rglob("*.css") if re.search(r"(url\(|@import )[\"']?(https?:)?//", path.read_text())
    ]
    assert styles == []


def test_images_have_a_text_in_their_place(site):
    """Every image says what it shows to those who do not see it."""
    assert [f"{name}: {image}" for name, page in site.items() for image in page.undescribed] == []
    assert "images/loop.svg" in site["concepts.html"].loads


def test_sources_are_shown_whole(site):
    """What a document links to outside of docs/ is a page with all of its text."""
    dockerfile = site["repository/deploy/Dockerfile.source.html"]
    assert " ".join((ROOT / "deploy/Dockerfile").read_text().split()) in dockerfile.text
