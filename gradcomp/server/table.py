"""Which piece of which parameter lives on which shard, and what it is compressed with, both ways."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgpack
from torch import Tensor

from gradcomp import handshake, registry
from gradcomp.bucket import Piece, Unit, tensor_table
from gradcomp.errors import PacketError
from gradcomp.exchanges.two_shot import TwoShot
from gradcomp.interfaces import Compressor
from gradcomp.rules import Choice

__all__ = ["MAX_TABLE_BYTES", "Row", "ShardTable", "cut"]

MAX_TABLE_BYTES = 16 << 20
_MAX_ROWS = 1 << 16
_MAX_DIMS = 16
_FIELDS = ("name", "start", "stop", "shape", "group", "push", "pull")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A piece of a parameter: a run of its rows, or all of it.

    Attributes:
        name: the parameter's.
        start, stop: range of its flat elements.
        shape: the piece's.
        group: number of the optimizer's parameter group.
        push, pull: what compresses its gradient, and its change.
    """

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    group: int
    push: Compressor
    pull: Compressor

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def describe(self) -> str:
        """The row as text, for the handshake's digest."""
        return f"{self.name} {self.start}:{self.stop} {list(self.shape)} group {self.group} {self.push} {self.pull}"


@dataclass(frozen=True)
class ShardTable:
    """The pieces of one shard, in order; the same on the server and on all workers."""

    rows: tuple[Row, ...]

    @property
    def numel(self) -> int:
        """Elements of all pieces."""
        return sum(row.numel for row in self.rows)

    def pieces(self, *, pull: bool = False) -> list[Piece]:
        """As :class:`gradcomp.message.Message` wants them: one unit a row, with the push or the pull compressor."""
        return [
            Piece(i, row.start, row.stop, row.shape, row.pull if pull else row.push) for i, row in enumerate(self.rows)
        ]

    def digest(self) -> bytes:
        """For the hello: eight bytes a row."""
        return handshake.digest_tensors([row.describe() for row in self.rows])

    def pack(self) -> bytes:
        """As msgpack; :meth:`unpack` reads it."""
        packed: bytes = msgpack.packb(
            [
                [row.name, row.start, row.stop, list(row.shape), row.group, *map(_config, (row.push, row.pull))]
                for row in self.rows
            ]
        )
        return packed

    @classmethod
    def unpack(cls, data: bytes | memoryview, *, max_numel: int) -> ShardTable:
        """A table from the network or from a file, checked.

        Raises:
            PacketError: malformed, or more than ``max_numel`` elements in all.
            ConfigError: a compressor that this installation does not have.
        """
        if len(data) > MAX_TABLE_BYTES:
            raise PacketError(f"table of {len(data)} bytes is over {MAX_TABLE_BYTES}")
        try:
            found = msgpack.unpackb(
                data, max_str_len=1 << 16, max_bin_len=0, max_array_len=_MAX_ROWS, max_map_len=0, max_ext_len=0
            )
            table = cls(tuple(_row(fields) for fields in found))
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise PacketError(f"not the table of a shard: {error}") from None
        if table.numel > max_numel:
            raise PacketError(f"table has {table.numel} elements; at most {max_numel} are allowed")
        return table


def _config(compressor: Compressor) -> str:
    return json.dumps(compressor.config(), sort_keys=True)


def _row(fields: object) -> Row:
    if not isinstance(fields, list) or len(fields) != len(_FIELDS):
        raise ValueError("a row has seven fields")
    name, start, stop, shape, group, push, pull = fields
    if not isinstance(name, str) or not all(type(text) is str for text in (push, pull)):
        raise ValueError("name and compressors are strings")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        raise ValueError(f"a shape is a list of at most {_MAX_DIMS} numbers")
    if any(type(n) is not int or not 0 <= n < 1 << 48 for n in (start, stop, group, *shape)):
        raise ValueError("numbers are integers in 0..2**48")
    if stop - start != math.prod(shape):
        raise ValueError(f"{name}: shape {shape} does not have {stop - start} elements")
    return Row(
        name=name,
        start=start,
        stop=stop,
        shape=tuple(shape),
        group=group,
        push=registry.compressor(json.loads(push)),
        pull=registry.compressor(json.loads(pull)),
    )


def cut(
    named: Sequence[tuple[str, Tensor]],
    *,
    groups: Mapping[str, int],
    push: Choice,
    pull: Choice,
    dense: Callable[[str, Tensor], bool],
    shards: int,
) -> list[ShardTable]:
    """The tables of all shards: consecutive runs of elements, cut at rows, about as many on each.

    Args:
        named: parameters by name, in the same order on every worker.
        groups: the optimizer's parameter group of each.
        push, pull: what compresses gradients, and changes.
        dense: which parameters go uncompressed, both ways.

    Raises:
        ConfigError: as :func:`gradcomp.bucket.tensor_table`.
    """
    pushed, pulled = (tensor_table(named, choice, dense) for choice in (push, pull))
    units = [Unit((i,), row.shape, row.codec) for i, row in enumerate(pushed)]
    tables: list[list[Row]] = [[] for _ in range(shards)]
    for piece in TwoShot().cut(units, shards):
        row = pushed[piece.unit]
        tables[piece.owner or 0].append(
            Row(
                name=row.name,
                start=piece.start,
                stop=piece.stop,
                shape=piece.shape,
                group=groups[row.name],
                push=piece.codec,
                pull=pulled[piece.unit].codec,
            )
        )
    return [ShardTable(tuple(rows)) for rows in tables]
