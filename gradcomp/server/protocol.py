"""Messages as bytes: how they are written, and how they are checked as they come in; see docs/FORMAT.md.

A message is four bytes (the length of its head, little-endian), the head, a msgpack list that begins with the number of
the kind, zeros up to a multiple of 8, and a body of raw bytes. Everything is checked: number and type of fields,
ranges, lengths.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import typing
from collections.abc import Sequence
from typing import Any

import msgpack

from gradcomp.errors import PacketError
from gradcomp.interfaces import Buffer
from gradcomp.server.messages import (
    Acked,
    Add,
    Alive,
    Beat,
    Busy,
    Changed,
    Empty,
    Event,
    Forgot,
    Hello,
    Join,
    Leave,
    Left,
    Look,
    Message,
    Options,
    Published,
    Pull,
    Push,
    Refused,
    Reply,
    Request,
    Setup,
    Status,
    Summed,
    Total,
    Unknown,
    Wait,
    Welcome,
)

__all__ = [
    "PROTOCOL_VERSION",
    "Acked",
    "Add",
    "Alive",
    "Beat",
    "Busy",
    "Changed",
    "Empty",
    "Event",
    "Forgot",
    "Join",
    "Leave",
    "Left",
    "Look",
    "Message",
    "Published",
    "Pull",
    "Push",
    "Refused",
    "Reply",
    "Request",
    "Setup",
    "Status",
    "Summed",
    "Total",
    "Unknown",
    "Wait",
    "Welcome",
    "pack",
    "unpack",
    "whole",
]

PROTOCOL_VERSION = 1
_MAX_HEAD_BYTES = 17 << 20  # a table of 16 MiB and what is beside it
_MAX_TEXT_BYTES = 1 << 17
_MAX_FIELDS = 64
_MAX_LIST = 1 << 12
_LENGTH = struct.Struct("<I")
_ALIGN = 8


def _subclasses(kind: type[Message]) -> list[type[Message]]:
    return [leaf for child in kind.__subclasses__() for leaf in (_subclasses(child) or [child])]


_KINDS: dict[int, type[Message]] = {kind.code: kind for kind in _subclasses(Message)}
_TYPES: dict[type[Message], dict[str, Any]] = {
    kind: {f.name: typing.get_type_hints(kind)[f.name] for f in dataclasses.fields(kind) if f.name != "body"}
    for kind in _KINDS.values()
}


def pack(message: Message) -> list[Buffer]:
    """The message's bytes, in parts that may be sent without a copy."""
    head = msgpack.packb([message.code, *(getattr(message, name) for name in _TYPES[type(message)])])
    body = message.body
    parts: list[Buffer] = [body] if isinstance(body, (bytes, bytearray, memoryview)) else list(body)
    return [_LENGTH.pack(len(head)) + head + bytes(_padding(len(head))), *parts]


def _padding(head_nbytes: int) -> int:
    """Bytes between head and body, so that what the body holds lies at multiples of its size."""
    return -(_LENGTH.size + head_nbytes) % _ALIGN


def whole(body: Sequence[Buffer] | Buffer) -> memoryview:
    """A body as one run of bytes: as it is where it is one already."""
    if not isinstance(body, (bytes, bytearray, memoryview)):
        body = body[0] if len(body) == 1 else bytearray().join(body)
    return memoryview(body).cast("B")


def unpack(data: Buffer) -> Message:
    """The message in ``data``; its body is a view of it.

    Raises:
        PacketError: anything that :func:`pack` would not have written.
    """
    view = memoryview(data).cast("B")
    if len(view) < _LENGTH.size:
        raise PacketError(f"message of {len(view)} bytes has no head")
    (nbytes,) = _LENGTH.unpack_from(view)
    head_ends = _LENGTH.size + nbytes
    body_begins = head_ends + _padding(nbytes)
    if nbytes > _MAX_HEAD_BYTES or body_begins > len(view):
        raise PacketError(f"head of {nbytes} bytes in a message of {len(view)}")
    if any(view[head_ends:body_begins]):
        raise PacketError("message has bytes set in its padding")
    head = view[_LENGTH.size : head_ends]
    try:
        found = msgpack.unpackb(
            head,
            strict_map_key=True,
            max_str_len=_MAX_TEXT_BYTES,
            max_bin_len=_MAX_HEAD_BYTES,
            max_array_len=_MAX_LIST,
            max_map_len=_MAX_FIELDS,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises many types, ValueError and its own among them
        raise PacketError(f"head is not msgpack within its limits: {error}") from None
    if not isinstance(found, list) or not found or type(found[0]) is not int or found[0] not in _KINDS:
        raise PacketError("head does not begin with the number of a kind")
    kind = _KINDS[found[0]]
    types = _TYPES[kind]
    if len(found) != 1 + len(types):
        raise PacketError(f"{kind.__name__} of {len(found) - 1} fields; it has {len(types)}")
    fields = dict(zip(types, found[1:], strict=True))
    for name, value in fields.items():
        if not _fits(value, types[name]):
            raise PacketError(f"{kind.__name__}.{name} is {str(value)[:100]!r}; it must be {_NAMES[types[name]]}")
    return kind(**fields, body=view[body_begins:])


_NAMES: dict[Any, str] = {
    int: "an integer in -1..2**63 - 1",
    float: "a finite float",
    bool: "true or false",
    str: "text",
    bytes: "bytes",
    Hello: "a flat map of text to text, integers or bytes",
    Options: "a list of maps of text to finite numbers",
}


def _fits(value: object, kind: Any) -> bool:
    if kind is int:
        return type(value) is int and -1 <= value < 1 << 63
    if kind is float:
        return type(value) is float and math.isfinite(value)
    if kind == Hello:
        return isinstance(value, dict) and all(
            isinstance(k, str) and type(v) in (str, int, bytes) for k, v in value.items()
        )
    if kind == Options:
        return isinstance(value, list) and all(
            isinstance(group, dict)
            and all(isinstance(k, str) and type(v) in (int, float) and math.isfinite(v) for k, v in group.items())
            for group in value
        )
    return type(value) is kind
