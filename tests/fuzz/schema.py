"""Requests made from the protobuf schema itself: every field at its extremes, wrong members, bytes that are none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

# Changes a message in one place.
Change = Callable[[Message], None]

_UINT32 = [0, 1, 2, 64, 65, 2**31 - 1, 2**31, 2**32 - 1]
_FLOAT = [float("nan"), float("inf"), float("-inf"), -0.0, 1e-45, -1e-45, 1e-3, 0.5, 1.0, -2.0, 101.0, 3.4e38, -3.4e38]
_STRING = ["", "\0", " ", "a", "é😀\u200d", "\ud7ff\ufffe", "{{ 7 // 0 }}{% x %}", "%s%n", "b" * 300, "c" * 100_000]
# How many entries a repeated field has besides none, one and two.
_MANY = [17, 65, 2000]
_VAST = 200_000


def extremes(field: FieldDescriptor) -> Sequence[Any]:
    """Values of one entry of a field that is no message."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_UINT32:
            return _UINT32
        case FieldDescriptor.CPPTYPE_UINT64:
            return [*_UINT32, 2**63 - 1, 2**63, 2**64 - 1]
        case FieldDescriptor.CPPTYPE_FLOAT:
            return _FLOAT
        case FieldDescriptor.CPPTYPE_STRING:
            return _STRING
        case FieldDescriptor.CPPTYPE_BOOL:
            return [False, True]
        case FieldDescriptor.CPPTYPE_ENUM:
            return [*(value.number for value in field.enum_type.values), -1, 99, 2**31 - 1]
    raise NotImplementedError(f"no extremes for {field.full_name}")


def changes(descriptor: Descriptor) -> Iterator[tuple[str, Change]]:
    """Every field of a message and of those inside it, set to each of its extremes; with the field's path."""
    for field in descriptor.fields:
        name = field.name
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            yield from ((name, change) for change in _of_map(field))
        elif field.message_type is not None:
            yield name, lambda message, name=name: message.ClearField(name)
            for below, change in changes(field.message_type):
                yield f"{name}.{below}", _inside(field, change)
            if field.is_repeated:
                for count in _MANY:
                    yield name, lambda message, name=name, n=count: [getattr(message, name).add() for _ in range(n)]
        elif field.is_repeated:
            yield from ((name, change) for change in _of_many(field))
        else:
            for value in extremes(field):
                yield name, lambda message, name=name, value=value: setattr(message, name, value)


def _inside(field: FieldDescriptor, change: Change) -> Change:
    def within(message: Message) -> None:
        if field.is_repeated:
            change(getattr(message, field.name).add())
        else:
            getattr(message, field.name).SetInParent()
            change(getattr(message, field.name))

    return within


def _of_many(field: FieldDescriptor) -> Iterator[Change]:
    def entries(values: Sequence[Any]) -> Change:
        def become(message: Message) -> None:
            message.ClearField(field.name)
            getattr(message, field.name).extend(values)

        return become

    yield entries([])
    known = extremes(field)
    for value in known:
        yield entries([value])
        yield entries([known[0], value])
    for count in _MANY:
        yield entries([known[1]] * count)
    if field.cpp_type != FieldDescriptor.CPPTYPE_STRING:
        yield entries([known[1]] * _VAST)


def _of_map(field: FieldDescriptor) -> Iterator[Change]:
    key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]

    def entries(pairs: dict[Any, Any]) -> Change:
        return lambda message: getattr(message, field.name).update(pairs)

    for id_ in extremes(key):
        yield entries({id_: extremes(value)[0]})
        yield entries({id_: 1.0})
    for number in extremes(value):
        yield entries({1: number})
    yield entries(dict.fromkeys(range(2000), 1.0))


def changed(valid: Message, applied: Sequence[Change]) -> bytes:
    """A message with changes, on the wire."""
    message = type(valid)()
    message.CopyFrom(valid)
    for change in applied:
        change(message)
    return message.SerializeToString()


def requests(valid: Sequence[Message]) -> st.SearchStrategy[bytes]:
    """Requests of one type on the wire: near one that is valid, of several members at once, and none at all."""
    every = [change for _, change in changes(valid[0].DESCRIPTOR)]
    some = st.lists(st.sampled_from(every), max_size=3) if every else st.just([])
    near = st.builds(changed, st.sampled_from([*valid, type(valid[0])()]), some)
    # Of the members of a oneof the last one on the wire counts; of everything else both do.
    merged = st.builds(lambda one, other: one + other, near, near)
    broken = st.builds(_damaged, near, st.integers(0), st.integers(0, 255))
    return st.one_of(near, near, near, merged, broken, st.binary(max_size=64))


def _damaged(data: bytes, place: int, byte: int) -> bytes:
    if not data:
        return bytes([byte])
    place %= len(data)
    return data[:place] + (bytes([byte]) if byte % 3 else b"") + data[place + 1 :]


_STEP = re.compile(r"([a-z0-9_]+)(?:\[(\d+)\])?")


def exists(path: str, descriptor: Descriptor) -> bool:
    """Whether a field's path leads through the schema: `start.sampling.logit_bias[7]`; a oneof counts as a field."""
    here: Descriptor | None = descriptor
    for step in path.split("."):
        found = _STEP.fullmatch(step)
        if here is None or found is None:
            return False
        name, index = found.groups()
        if name in here.oneofs_by_name:
            here = None
            continue
        field = here.fields_by_name.get(name)
        if field is None or (index is not None and not field.is_repeated):
            return False
        here = field.message_type
    return True
