"""Parameters <-> buckets <-> pieces.

A *bucket* is a run of parameters, in reverse order of registration (about the order in which backward makes their
gradients), that is exchanged at once. Its *units* are what a compressor sees as one tensor: a parameter by itself, or
all those joined whose compressor is stateless and not factored (the small ones that go dense, or the whole bucket for
``none``). An exchange cuts units into *pieces*; a message (gradcomp.message) is the packets of some pieces, from one
rank. State is keyed by parameter name and range, never by bucket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcomp.errors import ConfigError
from gradcomp.interfaces import Compressor
from gradcomp.options import check_integer
from gradcomp.rules import Choice, choose_for

__all__ = ["Bucket", "DenseRule", "Parameter", "Piece", "Unit", "plan_buckets", "tensor_table"]

# Of a bucket: what may go along with a tensor that is larger than that.
_LITTLE = 64


@dataclass(frozen=True, kw_only=True)
class DenseRule:
    """Which parameters are sent uncompressed (``none``, float32): the small and the one-dimensional.

    Biases and BatchNorm's scales are a thousandth of the bytes and much of the accuracy.

    Attributes:
        min_numel: tensors with fewer elements go dense; lower it to compress more.
        min_dim: tensors with fewer dimensions go dense; 0 leaves the choice to ``min_numel``.
    """

    min_numel: int = 1024
    min_dim: int = 2

    def __post_init__(self) -> None:
        check_integer("DenseRule", "min_numel", self.min_numel, at_least=0)
        check_integer("DenseRule", "min_dim", self.min_dim, at_least=0)

    def __call__(self, name: str, tensor: Tensor) -> bool:
        """Whether ``tensor`` goes dense."""
        return tensor.dim() < self.min_dim or tensor.numel() < self.min_numel


@dataclass(frozen=True)
class Parameter:
    """One row of the tensor table: what all ranks must agree on about a parameter.

    Attributes:
        frozen: whether it required no gradient when the table was made: it is not joined with those that do, which
            would have to send zeros for it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    codec: Compressor
    frozen: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def describe(self) -> str:
        """The row as text, for the handshake's digest."""
        frozen = " frozen" if self.frozen else ""
        return f"{self.name} {list(self.shape)} {self.dtype} {self.codec.config()}{frozen}"


@dataclass(frozen=True)
class Unit:
    """What a compressor sees as one tensor.

    Attributes:
        parameters: positions in the tensor table; several are joined flat, in this order.
        shape: the parameter's, or ``(numel,)`` for several joined.
    """

    parameters: tuple[int, ...]
    shape: tuple[int, ...]
    codec: Compressor

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """A contiguous range of a unit, compressed by itself.

    Attributes:
        unit: position in the bucket's units.
        start, stop: range of flat elements.
        shape: the whole unit's, or a run of its rows.
        owner: the rank that reduces it, or None if every rank does.
        reducers: ranks that reduce a part of it, each, on its way.
    """

    unit: int
    start: int
    stop: int
    shape: tuple[int, ...]
    codec: Compressor
    owner: int | None = None
    reducers: range = range(0)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def has_sum(self, rank: int | None) -> bool:
        """Whether that rank, if it is one, compresses a sum of packets again, and so has a state for it."""
        return rank is not None and (rank == self.owner or rank in self.reducers)


@dataclass(frozen=True)
class Bucket:
    """Parameters that are exchanged at once, and the units they form.

    Attributes:
        parameters: positions in the tensor table.
    """

    index: int
    parameters: tuple[int, ...]
    units: tuple[Unit, ...]


def plan_buckets(table: Sequence[Parameter], bucket_bytes: int) -> list[Bucket]:
    """Cut the tensor table, from its end, into buckets of at most ``bucket_bytes`` of float32.

    A tensor that is larger goes by itself, but for the little that may be waiting when it comes, its own layer's bias
    as a rule: a bucket costs the same whatever is in it.
    """
    groups: list[list[int]] = []
    filled = 0
    for position in reversed(range(len(table))):
        size = 4 * table[position].numel
        joins = size > bucket_bytes and filled <= bucket_bytes // _LITTLE
        if not groups or (filled + size > bucket_bytes and not joins):
            groups.append([])
            filled = 0
        groups[-1].append(position)
        filled += size
    return [Bucket(i, tuple(group), tuple(_units(table, group))) for i, group in enumerate(groups)]


def _units(table: Sequence[Parameter], positions: Sequence[int]) -> list[Unit]:
    joined: dict[tuple[Compressor, bool], list[int]] = {}
    units = []
    for position in positions:
        parameter = table[position]
        if parameter.codec.stateless and not parameter.codec.factored:
            joined.setdefault((parameter.codec, parameter.frozen), []).append(position)
        else:
            units.append(Unit((position,), parameter.shape, parameter.codec))
    for (codec, _), members in joined.items():
        units.append(Unit(tuple(members), (sum(table[m].numel for m in members),), codec))
    return units


def tensor_table(
    named: Sequence[tuple[str, Tensor]], compressor: Choice, dense: Callable[[str, Tensor], bool]
) -> list[Parameter]:
    """The tensor table, in registration order. A rule that names a parameter's compressor beats ``dense``.

    Raises:
        ConfigError: a parameter that is not float32, float16 or bfloat16, or a name that occurs twice.
    """
    from gradcomp.compressors.cast import NoCompression

    plain = NoCompression()
    table: list[Parameter] = []
    seen: set[str] = set()
    for name, tensor in named:
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ConfigError(f"parameter {name!r} is {tensor.dtype}; float32, float16 and bfloat16 can be exchanged")
        if name in seen:
            raise ConfigError(f"parameter name {name!r} occurs twice")
        seen.add(name)
        codec, explicit = choose_for(compressor, name, tensor)
        if not explicit and (codec.factored or not codec.stateless) and dense(name, tensor):
            codec = plain
        table.append(Parameter(name, tuple(tensor.shape), tensor.dtype, codec, not tensor.requires_grad))
    return table
