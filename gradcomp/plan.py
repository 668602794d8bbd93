"""The plan of an exchange: which parameter goes through which compressor, in which bucket, cut into which pieces.

It follows from the parameters, the compressor (or rules), the exchange and the world size alone, so that every rank
makes the same one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from gradcomp import handshake, replicas
from gradcomp.bucket import Bucket, Parameter, Piece, Unit, plan_buckets, tensor_table
from gradcomp.compressors.cast import NoCompression
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Exchange
from gradcomp.message import max_message_bytes
from gradcomp.registry import format_spec
from gradcomp.rules import Choice, Rules

__all__ = ["Plan", "Planner", "message_bounds"]

# More than a parameter's share of a message's head and its packet's header.
_HEADS_BYTES = 128
# Room for parameters that come later is at least that much: what is small need not be known beforehand.
_ROOM_BYTES = 1 << 20


@dataclass(frozen=True)
class Plan:
    """See the module.

    Attributes:
        compressor: what it was made for.
        table: one row a parameter, in order of registration.
        pieces: those of each bucket.
    """

    compressor: Choice
    table: list[Parameter]
    buckets: list[Bucket]
    pieces: list[list[Piece]]

    @classmethod
    def make(
        cls,
        named: Sequence[tuple[str, Tensor]],
        compressor: Choice,
        *,
        dense: Callable[[str, Tensor], bool],
        exchange: Exchange,
        world_size: int,
        bucket_bytes: int,
    ) -> Plan:
        """Plan for these parameters.

        Raises:
            ConfigError: as :func:`gradcomp.bucket.tensor_table`.
        """
        table = tensor_table(named, compressor, dense)
        for number, rule in enumerate(compressor.rules if isinstance(compressor, Rules) else ()):
            if not any(rule.matches(name, tensor) for name, tensor in named):
                logging.getLogger("gradcomp").warning("rule %d matches no parameter: %r", number, rule)
        buckets = plan_buckets(table, bucket_bytes)
        return cls(compressor, table, buckets, [exchange.cut(bucket.units, world_size) for bucket in buckets])

    @cached_property
    def has_state(self) -> bool:
        """Whether any parameter's compressor remembers something."""
        return any(not row.codec.stateless for row in self.table)

    @cached_property
    def bucket_of(self) -> dict[int, Bucket]:
        """The bucket of each parameter, by position in the table."""
        return {position: bucket for bucket in self.buckets for position in bucket.parameters}

    @cached_property
    def gradient_bytes(self) -> int:
        """All gradients as float32."""
        return 4 * sum(row.numel for row in self.table)

    @cached_property
    def numels(self) -> dict[str, int]:
        """The elements of every parameter, by name."""
        return {row.name: row.numel for row in self.table}

    @cached_property
    def specs(self) -> dict[str, str]:
        """Each parameter's compressor, as a spec string."""
        return {row.name: format_spec(row.codec) for row in self.table}

    def describe(self) -> dict[str, str | bytes]:
        """What ranks must agree on, for a hello."""
        return {
            "compressor": json.dumps(self.compressor.config(), sort_keys=True),
            "tensors": handshake.digest_tensors([row.describe() for row in self.table]),
        }

    def named_pieces(self) -> dict[tuple[str, str], Piece]:
        """The pieces whose compressors have state, by parameter and range as :class:`StateStore` names them."""
        return {
            (self.table[bucket.units[piece.unit].parameters[0]].name, f"{piece.start}:{piece.stop}"): piece
            for bucket, pieces in zip(self.buckets, self.pieces, strict=True)
            for piece in pieces
            if not piece.codec.stateless
        }

    def message_bytes(self) -> list[int]:
        """The longest message of each bucket."""
        return [
            max_message_bytes(pieces, len(bucket.parameters))
            for bucket, pieces in zip(self.buckets, self.pieces, strict=True)
        ]

    def most_bytes(self, exchange: Exchange, world_size: int) -> list[int]:
        """As :meth:`message_bytes`, leaving room for every parameter as float32 by itself: for a later compressor."""
        plain = NoCompression()
        dense = []
        for bucket in self.buckets:
            units = [Unit((p,), self.table[p].shape, plain) for p in bucket.parameters]
            dense.append(max_message_bytes(exchange.cut(units, world_size), len(units)))
        return [max(pair) for pair in zip(self.message_bytes(), dense, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Makes the plans of one exchange: what stays the same when parameters or compressor change.

    Attributes:
        exchange, world_size, bucket_bytes, dense: as for :meth:`Plan.make`.
        accept: raises ConfigError for compressors that will not do.
        has_model: whether linear layers are known, for ``factored`` compressors.
    """

    exchange: Exchange
    world_size: int
    bucket_bytes: int
    dense: Callable[[str, Tensor], bool]
    accept: Callable[[Choice], None] | None
    has_model: bool = False

    def plan(self, named: Sequence[tuple[str, Tensor]], compressor: Choice) -> Plan:
        """The plan for these parameters.

        Raises:
            ConfigError: none, on several devices, of a strange type, or with a compressor that is not accepted, or
                needs a model.
        """
        if not named:
            raise ConfigError("the optimizer has no parameters that require a gradient: there is nothing to exchange")
        if len({tensor.device for _, tensor in named}) > 1:
            raise ConfigError("parameters lie on several devices; one process exchanges the gradients of one device")
        if self.accept is not None:
            self.accept(compressor)
        plan = Plan.make(
            named,
            compressor,
            dense=self.dense,
            exchange=self.exchange,
            world_size=self.world_size,
            bucket_bytes=self.bucket_bytes,
        )
        factored = next((row for row in plan.table if row.codec.factored), None)
        if factored is not None and not self.has_model:
            raise ConfigError(
                f"compressor {factored.codec.id!r}, for parameter {factored.name!r}, needs to know the linear layers: "
                "pass model= to attach()"
            )
        return plan


def message_bounds(lengths: Sequence[int], tensors: Sequence[Tensor], later: Sequence[Tensor] = ()) -> tuple[int, int]:
    """The longest message there can be, and how much a rank can send another in a step or a broadcast, in bytes.

    Args:
        lengths: the longest message of each bucket.
        tensors: all that is broadcast.
        later: parameters that may come to them, in messages of their own.
    """
    sizes = [tensor.numel() * tensor.element_size() for tensor in (*tensors, *later)]
    more = max(_ROOM_BYTES, sum(4 * tensor.numel() + _HEADS_BYTES for tensor in later)) if later else 0
    # Broadcast chunks, averages and digests share the connection. What has no flat view is broadcast whole.
    others = max(replicas.BROADCAST_CHUNK_BYTES, 16 * len(sizes), *sizes)
    return max(*lengths, others) + more, max(2 * (sum(lengths) + more), sum(sizes)) + others
