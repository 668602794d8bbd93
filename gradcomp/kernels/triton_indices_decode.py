"""Coded index sets, checked, decoded, and added to a vector straight from their bytes, in Triton.

Two launches over the payload, whatever the size of the vector: the first sums up each chunk of it, the second looks up
what came before its own chunk and takes the elements. Only a MAP, which has a bit for every element, is a sweep over
them all. A set is checked by those same sums, before anything is written; the host waits for that once. One that was
checked before is added without a wait.

A set's elements are distinct, so each is added by one thread, in whatever order: the bits are the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.errors import PacketError
from gradcomp.kernels import reference_indices as reference
from gradcomp.kernels.reference_indices import Coding
from gradcomp.kernels.triton import EXACT

__all__ = ["add_signs", "add_values", "check", "decode"]

# Elements (WORDS, GAPS) or bits of a chunk, which is one program's. Of 0.1 % of 25M elements there are 60 chunks.
_BLOCK = 1024
_MAP_BLOCK = 4096
# Up to so many chunks each program adds up what came before it, which is less than another launch; from there on torch
# makes running sums of them first.
_MANY = 4096
_STRIDE: tl.constexpr = tl.constexpr(1024)  # how many of them at a time

# Numbers that differ from step to step: a kernel for each way they can be divided would be compiled in mid-training.
_VARY = ["payload", "values", "count", "numel", "nbytes", "chunks", "fields_nbytes", "width", "low_bits", "signs_at"]


@triton.jit
def _sum_before(totals, stop, scanned: tl.constexpr):
    """The sum of the first ``stop`` totals; they are running sums if ``scanned``."""
    if scanned:
        found = tl.load(totals + stop - 1, mask=stop > 0, other=0)
    else:
        sums = tl.zeros([_STRIDE], tl.int64)
        for start in range(0, stop, _STRIDE):
            at = start + tl.arange(0, _STRIDE)
            sums += tl.load(totals + at, mask=at < stop, other=0)
        found = tl.sum(sums, axis=0)
    return found


@triton.jit
def _count_ones(payload, at, stop):
    """How many bits are 1 in the bytes ``at``, of those before ``stop``."""
    byte = tl.load(payload + at, mask=at < stop, other=0).to(tl.int32)
    twos = byte - ((byte >> 1) & 0x55)
    fours = (twos & 0x33) + ((twos >> 2) & 0x33)
    return tl.sum((fours + (fours >> 4)) & 0x0F, axis=0)


@triton.jit
def _bit(payload, at, mask):
    """Bit ``at`` of the payload as int32; 0 where the mask is."""
    byte = tl.load(payload + (at >> 3), mask=mask, other=0).to(tl.int32)
    return (byte >> (at & 7).to(tl.int32)) & 1


@triton.jit
def _field(payload, nbytes, element, mask, width, touched: tl.constexpr):
    """RICE's field of each element, int64, of ``width`` bits, which lie in ``touched`` bytes at most; 0 by the mask."""
    start = element * width
    at, shift = start >> 3, start & 7
    field = tl.load(payload + at, mask=mask, other=0).to(tl.int64) >> shift
    for k in tl.static_range(1, touched):
        more = tl.load(payload + at + k, mask=mask & (at + k < nbytes), other=0).to(tl.int64)
        field |= (more << (8 * k - 8)) << (8 - shift)  # in two: a shift by 64 is not 0 everywhere
    return field & ((tl.full([], 1, tl.int64) << width) - 1)


@triton.jit
def _put(sink: tl.constexpr, out, values, plus, minus, rank, position, negative, mask):
    """Element number ``rank`` of the set, at ``position``: written to a list, or added."""
    if sink == "list":
        tl.store(out + rank, position, mask=mask)
        tl.store(values + rank, negative.to(tl.uint8), mask=mask)
    else:
        total = tl.load(out + position, mask=mask) + _term(sink, values, plus, minus, rank, negative, mask)
        tl.store(out + position, total, mask=mask)


@triton.jit
def _term(sink: tl.constexpr, values, plus, minus, rank, negative, mask):
    """What is added for an element. Minus is given beside plus: here -x is 0 - x, and that of 0.0 is not -0.0."""
    if sink == "signs":
        term = tl.where(negative != 0, minus, plus).to(tl.float32)
    else:
        term = tl.load(values + rank, mask=mask, other=0.0) * plus
    return term


@triton.jit(do_not_specialize=_VARY)
def _survey_words(payload, totals, count, chunks, block: tl.constexpr):
    """How many elements of each chunk are negative, and how many are not above the one before."""
    chunk = tl.program_id(0)
    at = chunk.to(tl.int64) * block + tl.arange(0, block)
    word = tl.load(payload + at, mask=at < count, other=0)
    last = tl.load(payload + at - 1, mask=(at > 0) & (at < count), other=0)
    falls = (at > 0) & (at < count) & ((word & 0x7FFFFFFF) <= (last & 0x7FFFFFFF))
    tl.store(totals + chunk, tl.sum((word < 0).to(tl.int32), axis=0))
    tl.store(totals + chunks + chunk, tl.sum(falls.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=_VARY)
def _survey_gaps(payload, totals, count, chunks, block: tl.constexpr):
    """By how much the elements of each chunk move on, and how many are negative."""
    chunk = tl.program_id(0)
    at = chunk.to(tl.int64) * block + tl.arange(0, block)
    unit = tl.load(payload + at, mask=at < count, other=0).to(tl.int32) & 0xFFFF
    steps = tl.where(at < count, (unit >> 1) + 1, 0)
    tl.store(totals + chunk, tl.sum(steps, axis=0))
    tl.store(totals + chunks + chunk, tl.sum(unit & 1, axis=0))


@triton.jit(do_not_specialize=_VARY)
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
    field = _field(payload, nbytes, element, element < count, width, touched)
    tl.store(totals + chunks + chunk, tl.sum(tl.where(element < count, field >> signed, 0), axis=0))


@triton.jit(do_not_specialize=_VARY)
def _survey_map(payload, totals, nbytes, block: tl.constexpr):
    """How many elements each chunk names."""
    chunk = tl.program_id(0)
    at = chunk.to(tl.int64) * (block // 8) + tl.arange(0, block // 8)
    tl.store(totals + chunk, _count_ones(payload, at, nbytes))


@triton.jit(do_not_specialize=_VARY)
def _take_words(payload, out, values, plus, minus, count, sink: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    word = tl.load(payload + at, mask=at < count, other=0)
    position = (word & 0x7FFFFFFF).to(tl.int64)
    _put(sink, out, values, plus, minus, at, position, (word >> 31) & 1, at < count)


@triton.jit(do_not_specialize=_VARY)
def _take_gaps(
    payload, totals, out, values, plus, minus, count, scanned: tl.constexpr, sink: tl.constexpr, block: tl.constexpr
):
    chunk = tl.program_id(0)
    at = chunk.to(tl.int64) * block + tl.arange(0, block)
    unit = tl.load(payload + at, mask=at < count, other=0).to(tl.int32) & 0xFFFF
    position = _sum_before(totals, chunk, scanned) + tl.cumsum((unit >> 1) + 1, axis=0) - 1
    _put(sink, out, values, plus, minus, at, position, unit & 1, at < count)


@triton.jit(do_not_specialize=_VARY)
def _take_rice(
    payload,
    totals,
    out,
    values,
    plus,
    minus,
    nbytes,
    fields_nbytes,
    width,
    low_bits,
    chunks,
    signed: tl.constexpr,
    touched: tl.constexpr,
    scanned: tl.constexpr,
    sink: tl.constexpr,
    block: tl.constexpr,
):
    chunk = tl.program_id(0)
    bit = chunk.to(tl.int64) * block + tl.arange(0, block)
    at = bit + 8 * fields_nbytes
    ends = _bit(payload, at, (at >> 3) < nbytes)
    first = _sum_before(totals, chunk, scanned)
    element = first + tl.cumsum(ends, axis=0) - 1
    field = _field(payload, nbytes, element, ends != 0, width, touched)
    low = tl.cumsum(tl.where(ends != 0, field >> signed, 0), axis=0)
    # The low bits before these: of whole chunks, and of the elements of one that end in another chunk than this.
    whole = first // block
    earlier = whole * block + tl.arange(0, block)
    fields = _field(payload, nbytes, earlier, earlier < first, width, touched)
    low += tl.sum(tl.where(earlier < first, fields >> signed, 0), axis=0)
    low += _sum_before(totals + chunks, whole.to(tl.int32), scanned)
    position = ((bit - element) << low_bits) + low + element
    negative = field & 1 if signed else tl.zeros_like(field)
    _put(sink, out, values, plus, minus, element, position, negative, ends != 0)


@triton.jit(do_not_specialize=_VARY)
def _take_map(
    payload,
    totals,
    out,
    values,
    plus,
    minus,
    numel,
    signs_at,
    signed: tl.constexpr,
    scanned: tl.constexpr,
    sink: tl.constexpr,
    block: tl.constexpr,
):
    chunk = tl.program_id(0)
    at = chunk.to(tl.int64) * block + tl.arange(0, block)
    named = _bit(payload, at, at < numel)
    rank = _sum_before(totals, chunk, scanned) + tl.cumsum(named, axis=0) - 1
    negative = _bit(payload, rank + 8 * signs_at, named != 0) if signed else tl.zeros_like(named)
    if sink == "list":
        _put(sink, out, values, plus, minus, rank, at, negative, named != 0)
    else:  # All of them, in whole vectors: of eight elements beside each other one or more is named, as a rule.
        before = tl.load(out + at, mask=at < numel)
        total = before + _term(sink, values, plus, minus, rank, negative, named != 0)
        tl.store(out + at, tl.where(named != 0, total, before), mask=at < numel)


@dataclass(frozen=True)
class _Set:
    """A payload, and what it is said to hold."""

    payload: Tensor
    count: int
    numel: int
    coding: Coding
    signed: bool

    def check(self) -> None:
        """Raise PacketError if this is no such set."""
        reference.check_size(self.payload, self.count, self.numel, self.coding, self.signed)
        if self.payload.numel():
            {
                Coding.WORDS: self._check_words,
                Coding.GAPS: self._check_gaps,
                Coding.RICE: self._check_rice,
                Coding.MAP: self._check_map,
            }[self.coding]()

    def take(self, sink: str, out: Tensor, values: Tensor, plus: float = 0.0, minus: float = 0.0) -> None:
        """Do with each element of a checked set what ``sink`` says: list, signs or values."""
        if not self.count:
            return
        coding, payload, target = self.coding, self.payload, (out, values, plus, minus)
        chunks = self._chunks
        if coding is Coding.WORDS:
            words = payload.view(torch.int32)
            _take_words[(chunks,)](words, *target, self.count, sink, _BLOCK, **EXACT)
            return
        totals, scanned = self._survey(), chunks > _MANY
        if scanned:
            totals = totals.cumsum(1)
        if coding is Coding.GAPS:
            units = payload.view(torch.int16)
            _take_gaps[(chunks,)](units, totals, *target, self.count, scanned, sink, _BLOCK, **EXACT)
        elif coding is Coding.RICE:
            sizes = payload.numel(), self._fields_nbytes, self._width, self._width - self.signed, chunks
            modes = self.signed, self._touched, scanned, sink, _BLOCK
            _take_rice[(chunks,)](payload, totals, *target, *sizes, *modes, **EXACT)
        else:
            sizes, modes = (self.numel, -(-self.numel // 8)), (self.signed, scanned, sink, _MAP_BLOCK)
            _take_map[(chunks,)](payload, totals, *target, *sizes, *modes, **EXACT)

    @property
    def _chunks(self) -> int:
        if self.coding is Coding.MAP:
            return triton.cdiv(self.numel, _MAP_BLOCK)
        if self.coding is Coding.RICE:  # bits that end elements: no fewer than elements
            return triton.cdiv(8 * (self.payload.numel() - self._fields_nbytes), _BLOCK)
        return triton.cdiv(self.count, _BLOCK)

    @property
    def _fields_nbytes(self) -> int:
        return reference.rice_fields_nbytes(self.count, self.numel, self.signed)

    @property
    def _width(self) -> int:
        return reference.rice_bits(self.count, self.numel) + self.signed

    @property
    def _touched(self) -> int:
        return (self._width + 14) // 8

    def _survey(self) -> Tensor:
        """Two sums for each chunk, int64: see the kernels. One for MAP."""
        payload, chunks = self.payload, self._chunks
        rows = 1 if self.coding is Coding.MAP else 2
        totals = torch.empty((rows, chunks), dtype=torch.int64, device=payload.device)
        if self.coding is Coding.WORDS:
            _survey_words[(chunks,)](payload.view(torch.int32), totals, self.count, chunks, _BLOCK)
        elif self.coding is Coding.GAPS:
            _survey_gaps[(chunks,)](payload.view(torch.int16), totals, self.count, chunks, _BLOCK)
        elif self.coding is Coding.RICE:
            sizes = self.count, payload.numel(), self._fields_nbytes, self._width, chunks
            _survey_rice[(chunks,)](payload, totals, *sizes, self.signed, self._touched, _BLOCK)
        else:
            _survey_map[(chunks,)](payload, totals, -(-self.numel // 8), _MAP_BLOCK)
        return totals

    def _sums(self, *ends: Tensor) -> list[int]:
        """The sums of all chunks, and some numbers of the payload beside them. Waits for the device."""
        return torch.cat([self._survey().sum(1), *ends]).tolist()  # type: ignore[no-any-return]

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
        fields_nbytes = self._fields_nbytes
        found, low, end, *field_end = self._sums(self.payload[-1:], self.payload[:fields_nbytes][-1:])
        if found != self.count or not end:
            raise PacketError(f"index set: not {self.count} elements, or bytes after the last one")
        self._check_spare(field_end, self.count * self._width)
        bits = 8 * (self.payload.numel() - fields_nbytes - 1) + end.bit_length()
        self._check_last(((bits - self.count) << (self._width - self.signed)) + low + self.count - 1)

    def _check_map(self) -> None:
        map_nbytes = -(-self.numel // 8)
        found, *ends = self._sums(self.payload[map_nbytes - 1 : map_nbytes], self.payload[map_nbytes:][-1:])
        if found != self.count:
            raise PacketError(f"index set: the map does not name {self.count} elements")
        self._check_spare(ends[:1], self.numel)
        self._check_spare(ends[1:], self.count if self.signed else 0)

    def _check_signs(self, negatives: int) -> None:
        if negatives and not self.signed:
            raise PacketError("index set: a sign bit is set in a set without signs")

    def _check_last(self, position: int) -> None:
        if position >= self.numel:
            raise PacketError(f"index set: index {position} is not below {self.numel}")

    def _check_spare(self, byte: list[int], used: int) -> None:
        """``byte``: the last of a part that has ``used`` bits; nothing if the part is empty."""
        if used % 8 and byte[0] >> used % 8:
            raise PacketError("index set: a bit is set beyond the last element")


def decode(payload: Tensor, count: int, numel: int, coding: Coding, *, signed: bool) -> tuple[Tensor, Tensor]:
    """:func:`gradcomp.indices.decode`, the same results and the same errors as the reference's; waits for the check."""
    found = _Set(payload, count, numel, coding, signed)
    found.check()
    index = torch.empty(count, dtype=torch.int64, device=payload.device)
    negative = torch.empty(count, dtype=torch.bool, device=payload.device)
    found.take("list", index, negative.view(torch.uint8))
    return index, negative


def check(payload: Tensor, count: int, numel: int, coding: Coding, *, signed: bool) -> None:
    """:func:`gradcomp.indices.check`, with the reference's errors; waits once."""
    _Set(payload, count, numel, coding, signed).check()


def add_signs(
    out: Tensor, payload: Tensor, count: int, coding: Coding, magnitude: float, *, checked: bool = False
) -> None:
    """:func:`gradcomp.kernels.reference.add_signs`, bit for bit.

    Args:
        checked: the payload was checked: it is taken as it is, and nothing is waited for.
    """
    found = _Set(payload, count, out.numel(), coding, True)
    if not checked:
        found.check()
    found.take("signs", out, out, float(magnitude), -float(magnitude))


def add_values(
    out: Tensor,
    payload: Tensor,
    count: int,
    coding: Coding,
    values: Tensor,
    scale: float,
    *,
    checked: bool = False,
) -> None:
    """:func:`gradcomp.kernels.reference.add_values`, bit for bit; ``checked`` as for :func:`add_signs`."""
    if values.numel() != count:
        raise ValueError(f"values must be {count}, as count says; got {values.numel()}")
    found = _Set(payload, count, out.numel(), coding, False)
    if not checked:
        found.check()
    found.take("values", out, values, float(scale))
