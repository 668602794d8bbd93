"""Coded index sets, surveyed and checked in Triton.

One launch sums up each chunk of the payload, 1,024 of its elements or bits, whatever the size of the vector they are
elements of; only a MAP has a bit for each. These sums show whether the payload is a set, which the host waits for once.
They are also what :mod:`gradcomp.kernels.triton_indices_decode` begins with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.errors import PacketError
from gradcomp.kernels import reference_indices as reference
from gradcomp.kernels.reference_indices import Coding

__all__ = ["VARY", "CodedSet", "check", "fields_of"]

# Elements (WORDS, GAPS) or bits of a chunk, which is one program's: of 0.1 % of 25M elements there are 60 chunks.
_BLOCK = 1024
_MAP_BLOCK = 4096

# Arguments that differ from step to step. A kernel for each way they can be divided would be compiled in mid-training.
VARY = ["payload", "values", "count", "numel", "nbytes", "chunks", "fields_nbytes", "width", "low_bits", "signs_at"]


@triton.jit
def _count_ones(payload, at, stop):
    """How many bits are 1 in the bytes ``at``, of those before ``stop``."""
    byte = tl.load(payload + at, mask=at < stop, other=0).to(tl.int32)
    twos = byte - ((byte >> 1) & 0x55)
    fours = (twos & 0x33) + ((twos >> 2) & 0x33)
    return tl.sum((fours + (fours >> 4)) & 0x0F, axis=0)


@triton.jit
def fields_of(payload, nbytes, element, mask, width, touched: tl.constexpr):
    """RICE's field of each element, int64, of ``width`` bits, which lie in ``touched`` bytes at most; 0 by the mask."""
    start = element * width
    at, shift = start >> 3, start & 7
    field = tl.load(payload + at, mask=mask, other=0).to(tl.int64) >> shift
    for k in tl.static_range(1, touched):
        more = tl.load(payload + at + k, mask=mask & (at + k < nbytes), other=0).to(tl.int64)
        field |= (more << (8 * k - 8)) << (8 - shift)  # in two: a shift by 64 is not 0 everywhere
    return field & ((tl.full([], 1, tl.int64) << width) - 1)


@triton.jit(do_not_specialize=VARY)
def _survey_words(payload, totals, count, chunks, block: tl.constexpr):
    """How many elements of each chunk are negative, and how many are not above the one before."""
    chunk = tl.program_id(0)
    at = chunk.to(tl.int64) * block + tl.arange(0, block)
    word = tl.load(payload + at, mask=at < count, other=0)
    last = tl.load(payload + at - 1, mask=(at > 0) & (at < count), other=0)
    falls = (at > 0) & (at < count) & ((word & 0x7FFFFFFF) <= (last & 0x7FFFFFFF))
    tl.store(totals + chunk, tl.sum((word < 0).to(tl.int32), axis=0))
    tl.store(totals + chunks + chunk, tl.sum(falls.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=VARY)
def _survey_gaps(payload, totals, count, chunks, block: tl.constexpr):
    """By how much the elements of each chunk move on, and how many are negative."""
    chunk = tl.program_id(0)
    at = chunk.to(tl.int64) * block + tl.arange(0, block)
    unit = tl.load(payload + at, mask=at < count, other=0).to(tl.int32) & 0xFFFF
    steps = tl.where(at < count, (unit >> 1) + 1, 0)
    tl.store(totals + chunk, tl.sum(steps, axis=0))
    tl.store(totals + chunks + chunk, tl.sum(unit & 1, axis=0))


@triton.jit(do_not_specialize=VARY)
def _survey_rice(
    payload,
    totals,
    count,
    nbytes,
    fields_nbytes,
    width,
    chunks,
    signed: tl.constexpr,
    touched: tl.constexpr,
    block: tl.constexpr,
):
    """How many elements end in each chunk of the bits that end them, and the sum of each chunk of low bits."""
    chunk = tl.program_id(0)
    at = fields_nbytes + chunk.to(tl.int64) * (block // 8) + tl.arange(0, block // 8)
    tl.store(totals + chunk, _count_ones(payload, at, nbytes))
    element = chunk.to(tl.int64) * block + tl.arange(0, block)
    field = fields_of(payload, nbytes, element, element < count, width, touched)
    tl.store(totals + chunks + chunk, tl.sum(tl.where(element < count, field >> signed, 0), axis=0))


@triton.jit(do_not_specialize=VARY)
def _survey_map(payload, totals, nbytes, block: tl.constexpr):
    """How many elements each chunk names."""
    chunk = tl.program_id(0)
    at = chunk.to(tl.int64) * (block // 8) + tl.arange(0, block // 8)
    tl.store(totals + chunk, _count_ones(payload, at, nbytes))


@dataclass(frozen=True)
class CodedSet:
    """A payload, and what it is said to hold."""

    payload: Tensor
    count: int
    numel: int
    coding: Coding
    signed: bool

    @cached_property
    def fields_nbytes(self) -> int:
        """RICE: bytes of the fields, which come first."""
        return reference.rice_fields_nbytes(self.count, self.numel, self.signed)

    @cached_property
    def low_bits(self) -> int:
        """RICE: bits of a field, without the sign."""
        return reference.rice_bits(self.count, self.numel)

    @cached_property
    def width(self) -> int:
        """RICE: bits of a field."""
        return self.low_bits + self.signed

    @property
    def touched(self) -> int:
        """RICE: in how many bytes a field may lie."""
        return (self.width + 14) // 8

    @property
    def map_nbytes(self) -> int:
        """MAP: bytes of the map; the signs come after it."""
        return -(-self.numel // 8)

    @property
    def block(self) -> int:
        """How much a chunk is: elements of WORDS and GAPS, bits of a MAP or of those that end RICE's elements."""
        return _MAP_BLOCK if self.coding is Coding.MAP else _BLOCK

    @cached_property
    def chunks(self) -> int:
        """How many there are. RICE has as many bits as elements at least, so it also covers those."""
        length = {Coding.MAP: self.numel, Coding.RICE: 8 * (self.payload.numel() - self.fields_nbytes)}
        return -(-length.get(self.coding, self.count) // self.block)

    def survey(self) -> Tensor:
        """Two sums for each chunk, int64, one for each chunk of a MAP: what they are of is said at the kernels."""
        payload, chunks, block = self.payload, self.chunks, self.block
        rows = 1 if self.coding is Coding.MAP else 2
        totals = torch.empty((rows, chunks), dtype=torch.int64, device=payload.device)
        if self.coding is Coding.WORDS:
            _survey_words[(chunks,)](payload.view(torch.int32), totals, self.count, chunks, block)
        elif self.coding is Coding.GAPS:
            _survey_gaps[(chunks,)](payload.view(torch.int16), totals, self.count, chunks, block)
        elif self.coding is Coding.RICE:
            sizes = self.count, payload.numel(), self.fields_nbytes, self.width, chunks
            _survey_rice[(chunks,)](payload, totals, *sizes, int(self.signed), self.touched, block)
        else:
            _survey_map[(chunks,)](payload, totals, self.map_nbytes, block)
        return totals

    def check(self) -> None:
        """Raise the PacketError of the reference if this is no such set."""
        reference.check_size(self.payload, self.count, self.numel, self.coding, self.signed)
        if not self.payload.numel():
            return
        if self.coding is Coding.WORDS:
            self._check_words()
        elif self.coding is Coding.GAPS:
            self._check_gaps()
        elif self.coding is Coding.RICE:
            self._check_rice()
        else:
            self._check_map()

    def _sums(self, *ends: Tensor) -> list[int]:
        """The sums over all chunks, then these numbers of the payload; waits for the device."""
        found: list[int] = torch.cat([self.survey().sum(1), *ends]).tolist()
        return found

    def _check_words(self) -> None:
        negatives, falls, last = self._sums(self.payload.view(torch.int32)[-1:])
        self._check_signs(negatives)
        if falls:
            raise PacketError("index set: indices are not strictly increasing")
        self._check_last(last & 0x7FFFFFFF)

    def _check_gaps(self) -> None:
        steps, negatives = self._sums()
        self._check_signs(negatives)
        self._check_last(steps - 1)

    def _check_rice(self) -> None:
        # No sum overflows: count * 2**low_bits <= numel <= 2**59, and the payload is no longer than it may be.
        unary_nbytes = self.payload.numel() - self.fields_nbytes
        found, low, end, *field_end = self._sums(self.payload[-1:], self.payload[: self.fields_nbytes][-1:])
        if found != self.count or not end:
            raise PacketError(f"index set: not {self.count} elements, or bytes after the last one")
        _check_spare(field_end, self.count * self.width)
        zeros = 8 * (unary_nbytes - 1) + end.bit_length() - self.count
        self._check_last((zeros << self.low_bits) + low + self.count - 1)

    def _check_map(self) -> None:
        found, map_end, *sign_end = self._sums(
            self.payload[self.map_nbytes - 1 : self.map_nbytes], self.payload[self.map_nbytes :][-1:]
        )
        if found != self.count:
            raise PacketError(f"index set: the map does not name {self.count} elements")
        _check_spare([map_end], self.numel)
        _check_spare(sign_end, self.count)

    def _check_signs(self, negatives: int) -> None:
        if negatives and not self.signed:
            raise PacketError("index set: a sign bit is set in a set without signs")

    def _check_last(self, position: int) -> None:
        if position >= self.numel:
            raise PacketError(f"index set: index {position} is not below {self.numel}")


def check(payload: Tensor, count: int, numel: int, coding: Coding, *, signed: bool) -> None:
    """:func:`gradcomp.indices.check`, with the reference's errors; waits once."""
    CodedSet(payload, count, numel, coding, signed).check()


def _check_spare(end: list[int], used: int) -> None:
    """``end``: the last byte of a part whose first ``used`` bits mean something; nothing if there is no such part."""
    if end and used % 8 and end[0] >> used % 8:
        raise PacketError("index set: a bit is set beyond the last element")
