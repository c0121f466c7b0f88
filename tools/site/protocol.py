"""The protocol reference: a page of Markdown for each proto file, from its declarations and comments.

Everything that a proto file declares stands on its page under an anchor of its full name, and whatever names a type
links to it. protoc reads the files, so that the pages cannot say anything else than the services do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

__all__ = ["pages"]

# Numbers of the fields by which descriptor.proto addresses a declaration: SourceCodeInfo.Location.path.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS, _NESTED_ENUMS, _RESERVED = 2, 4, 9
_VALUES = _METHODS = 2
_SYNTAX = 12

_Place: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class _Context:
    """What a declaration's text needs besides the declaration."""

    comments: Mapping[_Place, str]
    pages: Mapping[str, str]
    """Full name of a type to the page that has it."""
    entries: Mapping[str, DescriptorProto]
    """Full name of a map's entry to its declaration, which no page has."""


def pages(root: Path) -> dict[str, str]:
    """Name of a page ("target.md") to its Markdown, for all proto files below `root`. Raises RuntimeError when protoc
    fails."""
    protos = _read(root)
    homes = {name: _page(proto) for proto in protos for name in _types(proto)}
    entries = {
        f".{proto.package}.{message.name}.{nested.name}": nested
        for proto in protos
        for message in proto.message_type
        for nested in message.nested_type
        if nested.options.map_entry
    }
    rendered = {}
    for proto in protos:
        comments = {
            tuple(location.path): _text(location.leading_comments) for location in proto.source_code_info.location
        }
        rendered[_page(proto)] = "\n\n".join(_file(proto, _Context(comments, homes, entries))) + "\n"
    return rendered


def _read(root: Path) -> list[FileDescriptorProto]:
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image"
        search = [f"-I{root}", f"-I{files('grpc_tools') / '_proto'}"]
        if protoc.main(["protoc", *search, "--include_source_info", f"--descriptor_set_out={image}", *names]) != 0:
            raise RuntimeError("protoc failed")
        return list(descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file)


def _page(proto: FileDescriptorProto) -> str:
    return PurePosixPath(proto.name).with_suffix(".md").name


def _types(proto: FileDescriptorProto) -> Iterator[str]:
    for message in proto.message_type:
        yield from (f".{proto.package}.{message.name}.{nested.name}" for nested in message.enum_type)
    yield from (f".{proto.package}.{declared.name}" for declared in [*proto.message_type, *proto.enum_type])


def _file(proto: FileDescriptorProto, context: _Context) -> Iterator[str]:
    yield f"# {proto.name}"
    yield context.comments.get((_SYNTAX,), "")
    for index, service in enumerate(proto.service):
        yield from _service(service, proto.package, (_SERVICES, index), context)
    if proto.message_type:
        yield "## Messages"
    for index, message in enumerate(proto.message_type):
        yield from _message(message, proto.package, (_MESSAGES, index), context)
    if proto.enum_type:
        yield "## Enumerations"
    for index, enum in enumerate(proto.enum_type):
        yield from _enum(enum, enum.name, proto.package, (_ENUMS, index), context)


def _service(service: ServiceDescriptorProto, package: str, place: _Place, context: _Context) -> Iterator[str]:
    name = f"{package}.{service.name}"
    yield f"## {service.name} {{ #{name} }}"
    yield context.comments.get(place, "")
    for index, method in enumerate(service.method):
        request = "stream of " * method.client_streaming + _link(method.input_type, context)
        response = "stream of " * method.server_streaming + _link(method.output_type, context)
        yield f"### {method.name} {{ #{name}.{method.name} }}"
        yield f"{request} → {response}"
        yield context.comments.get((*place, _METHODS, index), "")


def _message(message: DescriptorProto, package: str, place: _Place, context: _Context) -> Iterator[str]:
    name = f"{package}.{message.name}"
    yield f"### {message.name} {{ #{name} }}"
    yield context.comments.get(place, "")
    oneofs = [_oneof(field, message) for field in message.field]
    rows = [
        (
            f"{field.number}",
            f"`{field.name}` {{ #{name}.{field.name} }}",
            _kind(field, context),
            context.comments.get((*place, _FIELDS, index), ""),
        )
        for index, field in enumerate(message.field)
    ]
    for oneof, group in groupby(zip(oneofs, rows, strict=True), key=lambda pair: pair[0]):
        if oneof:
            yield f"One of, as `{oneof}`:"
        yield _table(("", "field", "type", ""), [row for _, row in group])
    if not rows:
        yield "No fields."
    reserved = [str(number) for span in message.reserved_range for number in range(span.start, span.end)]
    if reserved:
        yield f"Reserved: {', '.join(reserved)}. {context.comments.get((*place, _RESERVED), '')}"
    for index, enum in enumerate(message.enum_type):
        yield from _enum(enum, f"{message.name}.{enum.name}", name, (*place, _NESTED_ENUMS, index), context)
    for nested in message.nested_type:
        if not nested.options.map_entry:
            raise RuntimeError(f"{name}.{nested.name}: messages within messages have no place in the reference yet")


def _enum(enum: EnumDescriptorProto, title: str, scope: str, place: _Place, context: _Context) -> Iterator[str]:
    name = f"{scope}.{enum.name}"
    yield f"### {title} {{ #{name} }}"
    yield context.comments.get(place, "")
    yield _table(
        ("", "value", ""),
        [
            (
                f"{value.number}",
                f"`{value.name}` {{ #{name}.{value.name} }}",
                context.comments.get((*place, _VALUES, index), ""),
            )
            for index, value in enumerate(enum.value)
        ],
    )


def _oneof(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    """The oneof that a field is in, or "". Behind an `optional` field stands one that nobody wrote."""
    if field.proto3_optional or not field.HasField("oneof_index"):
        return ""
    return message.oneof_decl[field.oneof_index].name


def _kind(field: FieldDescriptorProto, context: _Context) -> str:
    entry = context.entries.get(field.type_name)
    if entry is not None:
        return f"map of {_single(entry.field[0], context)} to {_single(entry.field[1], context)}"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {_single(field, context)}"
    return "optional " * field.proto3_optional + _single(field, context)


def _single(field: FieldDescriptorProto, context: _Context) -> str:
    if field.type_name:
        return _link(field.type_name, context)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _link(type_name: str, context: _Context) -> str:
    """A type's name, which links to its declaration."""
    return f"[{type_name.rpartition('.')[2]}]({context.pages[type_name]}#{type_name[1:]})"


def _text(comment: str) -> str:
    """A comment's Markdown: each line has lost its `//`, and keeps the space behind it."""
    lines = [line.removeprefix(" ").rstrip() for line in comment.splitlines()]
    # A list behind a paragraph needs an empty line before it.
    spaced = [
        f"\n{line.lstrip()}" if line.startswith("  * ") and not before.startswith("  ") else line.removeprefix("  ")
        for before, line in zip(["", *lines], lines, strict=False)
    ]
    return "\n".join(spaced).strip().replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head)]
    lines += [
        tuple(cell.replace("\n\n", "<br>").replace("\n", " ").replace("|", "\\|") for cell in row) for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
