"""The references say everything that there is to know: of the protocol, and of the client."""

from __future__ import annotations

import inspect
import re
from enum import Enum

import pytest

import specpair
from specpair.v1 import common_pb2, draft_pb2, target_pb2

from .pages import ROOT

FILES = {"common": common_pb2.DESCRIPTOR, "draft": draft_pb2.DESCRIPTOR, "target": target_pb2.DESCRIPTOR}
PAGES = ("reference/client.html", "reference/requests.html", "reference/results.html", "reference/errors.html")


def _declared(descriptor):
    """Full names of everything that a proto file declares; the entries of maps are not declared."""
    enums = list(descriptor.enum_types_by_name.values())
    for message in descriptor.message_types_by_name.values():
        yield message.full_name
        yield from (field.full_name for field in message.fields)
        enums += message.enum_types
    for enum in enums:
        yield enum.full_name
        yield from (f"{enum.full_name}.{value.name}" for value in enum.values)
    for service in descriptor.services_by_name.values():
        yield service.full_name
        yield from (method.full_name for method in service.methods)


@pytest.mark.parametrize("name", FILES)
def test_the_protocol_is_all_there(site, name):
    """Every message, field, enumeration, value, service and method has its anchor on the page of its file."""
    declared = set(_declared(FILES[name]))
    assert len(declared) > 20
    assert declared - site[f"protocol/{name}.html"].ids == set()


@pytest.mark.parametrize("name", FILES)
def test_comments_of_the_protocol_are_all_there(site, name):
    """Every comment of a proto file stands on its page, word for word, but for the marks of Markdown."""
    source = (ROOT / f"protos/specpair/v1/{name}.proto").read_text()
    comments = [re.sub(r"^ *//", "", block, flags=re.M) for block in re.findall(r"(?:^ *//.*\n)+", source, re.M)]
    paragraphs = [part for comment in comments for part in re.split(r"\n *(?:\n|\* )", comment)]
    plain = [" ".join(paragraph.replace("`", "").split()) for paragraph in paragraphs]
    assert len(plain) > 10
    assert [paragraph for paragraph in plain if paragraph not in site[f"protocol/{name}.html"].text] == []


def _public():
    """Full names of what `specpair` exports, and of the public members that its classes define or inherit from it."""
    for name in specpair.__all__:
        yield f"specpair.{name}"
        kind = getattr(specpair, name)
        if inspect.isclass(kind):
            members = [
                *getattr(kind, "__dataclass_fields__", ()),
                *vars(kind),
                *(kind.__members__ if issubclass(kind, Enum) else ()),
            ]
            yield from (f"specpair.{name}.{member}" for member in members if not member.startswith("_"))


def test_the_client_is_all_there(site):
    """Every public name of the client, and every public member of its classes, has its anchor in the reference."""
    public = set(_public())
    assert len(public) > 100
    assert public - set().union(*(site[page].ids for page in PAGES)) == set()


def test_public_names_are_documented():
    """Every exported class says what it is, and so does each of its methods and properties."""
    silent = []
    for name in specpair.__all__:
        kind = getattr(specpair, name)
        if not inspect.isclass(kind):
            continue
        members = {member: value for member, value in vars(kind).items() if not member.startswith("_")}
        behaving = [
            member for member, value in members.items() if inspect.isfunction(value) or isinstance(value, property)
        ]
        silent += [f"{name}.{member}" for member in behaving if not inspect.getdoc(getattr(kind, member))]
        silent += [name] * (not (kind.__doc__ or "").strip() or kind.__doc__.startswith(f"{name}("))
    assert silent == []
