"""Published changes: how a worker adds one to its copy, which is how the server does it too, bit for bit."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradcomp.compressors.cast import NoCompression
from gradcomp.errors import PacketError
from gradcomp.interfaces import Buffer
from gradcomp.message import Message
from gradcomp.packet import Kind
from gradcomp.server.table import Row, ShardTable

__all__ = ["add", "carries_values", "framed", "read", "rows_of"]

_LENGTH = struct.Struct("<Q")
_CPU = torch.device("cpu")


def rows_of(table: ShardTable, flat: Tensor) -> list[Tensor]:
    """The rows' parts of ``flat``, which holds them all one after the other; flat, in its memory."""
    return list(torch.split(flat, [row.numel for row in table.rows]))


def carries_values(row: Row) -> bool:
    """Whether changes of this row are its new values themselves: so with ``none``, which loses nothing then."""
    return isinstance(row.pull, NoCompression)


def add(table: ShardTable, rows: Sequence[Tensor], change: Message) -> None:
    """Add a change to ``rows``, in place.

    Args:
        rows: flat float32, on the packets' device (:func:`rows_of`).

    Raises:
        PacketError: a packet is not its row's.
    """
    for row, values, packet in zip(table.rows, rows, change.packets, strict=True):
        if packet is None:
            continue
        if carries_values(row):
            packet.require(Kind.DENSE_F32)
            values.copy_(packet.payload.view(torch.float32))
        else:
            row.pull.decompress_add(packet, values)


def framed(change: Message) -> list[Buffer]:
    """A change as it stands in the body of a reply: its length before it."""
    parts = change.buffers
    return [_LENGTH.pack(sum(len(part) for part in parts)), *parts]


def read(table: ShardTable, body: memoryview, device: torch.device = _CPU) -> Iterator[Message]:
    """The changes in the body of a reply, in order.

    Raises:
        PacketError: malformed.
    """
    pieces, at = table.pieces(pull=True), 0
    while at < len(body):
        if len(body) - at < _LENGTH.size:
            raise PacketError(f"changes end with {len(body) - at} bytes that are not a length")
        (nbytes,) = _LENGTH.unpack_from(body, at)
        at += _LENGTH.size
        if nbytes > len(body) - at:
            raise PacketError(f"a change of {nbytes} bytes in a body of {len(body)}")
        yield Message.parse(body[at : at + nbytes], pieces, len(pieces), device)
        at += nbytes
