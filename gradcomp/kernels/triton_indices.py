"""Index sets as bytes, in Triton: what :func:`gradcomp.kernels.reference_indices.encode` writes, and nothing waits.

How many elements a set has is known on the device only, so the coding is chosen there too, and the bytes are written to
the front of a buffer that fits the longest set there can be. What becomes of it all is in a vector of int64, the status
(``FLAGS`` and so on say what is where), which the host reads once, at the end.

A set comes as a bit plane, 32 elements a word, with a second plane of signs. MAP is that plane. For the others its ones
are listed, position * 2 + sign each: fewer than an eighth of the elements, or MAP were chosen. From that list every
element writes its own bits, with atomic or: which comes first does not matter, so the result is always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels.reference_indices import Coding
from gradcomp.kernels.triton import grid

__all__ = [
    "CODING",
    "COUNT",
    "COUNTED_WORDS",
    "FLAGS",
    "LARGEST",
    "LEAST",
    "LOW_BITS",
    "NBYTES",
    "NEXT_TAU",
    "PASSED",
    "STATUS_SIZE",
    "TAU",
    "TIES",
    "add_before",
    "choose_coding",
    "count_ones",
    "list_capacity",
    "scan",
    "spread",
    "write_list",
]

# Where in the status what is.
FLAGS: tl.constexpr = tl.constexpr(0)  # 1: acc holds inf, 2: -inf, 4: NaN
LARGEST: tl.constexpr = tl.constexpr(1)  # magnitude in the gradient, as the bits of a float32
PASSED: tl.constexpr = tl.constexpr(2)  # how many elements passed
COUNT: tl.constexpr = tl.constexpr(3)  # how many are sent
CODING: tl.constexpr = tl.constexpr(4)
LOW_BITS: tl.constexpr = tl.constexpr(5)  # of a gap, for RICE
NBYTES: tl.constexpr = tl.constexpr(6)  # of the payload
LEAST: tl.constexpr = tl.constexpr(7)  # magnitude that is sent, as bits
TIES: tl.constexpr = tl.constexpr(8)  # how many of that magnitude are sent
TAU: tl.constexpr = tl.constexpr(9)  # found in a sample: what was encoded with, as the bits of a float32
NEXT_TAU: tl.constexpr = tl.constexpr(10)  # and what to encode with at the next step
STATUS_SIZE = 11

_WORDS: tl.constexpr = tl.constexpr(int(Coding.WORDS))
_GAPS: tl.constexpr = tl.constexpr(int(Coding.GAPS))
_MAP: tl.constexpr = tl.constexpr(int(Coding.MAP))
_RICE: tl.constexpr = tl.constexpr(int(Coding.RICE))

COUNTED_WORDS = 128  # of a plane, whose ones are counted together
_WORDS_BLOCK = 1024
_LIST_BLOCK = 1024
_SCAN_BLOCK = 4096


@triton.jit
def count_ones(word):
    """How many bits of each uint32 are 1, as int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def add_before(parts, number, block: tl.constexpr):
    """The sum of the first ``number`` of ``parts``, int64."""
    lane = tl.arange(0, block)
    total = tl.zeros((), tl.int64)
    for first in range(0, number, block):
        total += tl.sum(tl.load(parts + first + lane, mask=first + lane < number, other=0), axis=0)
    return total


@triton.jit
def _field_bytes(count, low_bits, signed: tl.constexpr):
    return (count * (low_bits + signed) + 7) // 8


@triton.jit
def choose_coding(count, numel, signed: tl.constexpr):
    """:func:`gradcomp.kernels.reference_indices.choose`, the low bits for RICE, and the bytes: with RICE the most."""
    bit = tl.arange(0, 64)
    numel = numel.to(tl.int64)
    mean = (numel - count) // tl.maximum(count, 1)
    low_bits = tl.sum((((mean >> bit) > 0) & (bit > 0)).to(tl.int64), axis=0)
    low_bits = tl.where(count > 0, low_bits, 0)
    map_nbytes = (numel + 7) // 8
    if signed:
        map_nbytes += (count + 7) // 8
    rice_nbytes = _field_bytes(count, low_bits, signed) + (count + ((numel - count) >> low_bits) + 7) // 8
    rice_nbytes = tl.where(count > 0, rice_nbytes, 0)
    # In the order of the codings: of equal ones the first.
    coding = tl.where(numel <= 1 << 31, _WORDS, _MAP)
    nbytes = tl.where(numel <= 1 << 31, 4 * count, map_nbytes)
    shorter = (numel <= 1 << 15) & (2 * count < nbytes)
    coding, nbytes = tl.where(shorter, _GAPS, coding), tl.where(shorter, 2 * count, nbytes)
    coding, nbytes = tl.where(map_nbytes < nbytes, _MAP, coding), tl.where(map_nbytes < nbytes, map_nbytes, nbytes)
    coding, nbytes = tl.where(rice_nbytes < nbytes, _RICE, coding), tl.where(rice_nbytes < nbytes, rice_nbytes, nbytes)
    dense = 8 * count > numel
    return tl.where(dense, _MAP, coding), low_bits, tl.where(dense, map_nbytes, nbytes)


@triton.jit(do_not_specialize=["blocks", "numel"])
def _scan(counts, status, blocks, numel, choose: tl.constexpr, block: tl.constexpr):
    """Make of every count the sum of those before it; with ``choose`` all that is counted is sent, with signs."""
    lane = tl.arange(0, block)
    total = tl.zeros((), tl.int64)
    for first in range(0, blocks, block):
        inside = first + lane < blocks
        count = tl.load(counts + first + lane, mask=inside, other=0)
        tl.store(counts + first + lane, total + tl.cumsum(count, axis=0) - count, mask=inside)
        total += tl.sum(count, axis=0)
    tl.store(status + PASSED, total)
    if choose:
        coding, low_bits, nbytes = choose_coding(total, numel, True)
        tl.store(status + COUNT, total)
        tl.store(status + CODING, coding)
        tl.store(status + LOW_BITS, low_bits)
        tl.store(status + NBYTES, nbytes)


@triton.jit
def _or_bits(out, at, bits, inside):
    """``out``, int32, with the bits of ``bits``, below 2**32 as int64, from the bit ``at`` on."""
    moved = bits << (at & 31)
    tl.atomic_or(out + (at >> 5), moved.to(tl.int32), mask=inside, sem="relaxed")
    tl.atomic_or(out + (at >> 5) + 1, (moved >> 32).to(tl.int32), mask=inside & ((moved >> 32) != 0), sem="relaxed")


@triton.jit(do_not_specialize=["numel", "capacity"])
def _spread(
    mask, negative, counts, marks, out, status, numel, capacity,
    signed: tl.constexpr, per: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """List the ones of the planes; signed ones that become a MAP are written to ``out`` at once."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    words = (numel + 31) // 32
    word = tl.load(mask + at, mask=at < words, other=0).to(tl.uint32, bitcast=True)
    ones = count_ones(word)
    most = tl.max(ones, axis=0)
    place = tl.load(counts + tl.program_id(0) * (block // per)) + (tl.cumsum(ones, axis=0) - ones)
    if signed:
        below = tl.load(negative + at, mask=at < words, other=0).to(tl.uint32, bitcast=True)
        as_map = tl.load(status + CODING) == _MAP
    else:
        as_map = False
    if as_map:
        # The last word may share its place with the first signs.
        tl.store(out + at, word.to(tl.int32, bitcast=True), mask=at < words - 1)
        tl.atomic_or(out + at, word.to(tl.int32, bitcast=True), mask=at == words - 1, sem="relaxed")
        packed = tl.zeros((block,), tl.int64)
        if signed:
            for k in range(most):
                bit = count_ones((word ^ (word & (word - 1))) - 1)  # of no ones the last; its sign is 0
                packed |= ((below >> (bit & 31).to(tl.uint32)) & (word != 0).to(tl.uint32)).to(tl.int64) << k
                word &= word - 1
        _or_bits(out, (numel + 7) // 8 * 8 + place, packed, ones > 0)
    else:
        for _ in range(most):
            bit = count_ones((word ^ (word & (word - 1))) - 1)
            mark = (at * 32 + bit) * 2
            if signed:
                mark += ((below >> (bit & 31).to(tl.uint32)) & 1).to(tl.int64)
            tl.store(marks + place, mark.to(marks.dtype.element_ty), mask=(word != 0) & (place < capacity))
            place += 1
            word &= word - 1


@triton.jit
def _gaps(marks, at, count):
    """The marks at ``at``, and how many elements each has between it and the one before."""
    mark = tl.load(marks + at, mask=at < count, other=0).to(tl.int64)
    before = tl.load(marks + at - 1, mask=(at < count) & (at > 0), other=-2).to(tl.int64)
    return mark, tl.where(at < count, (mark >> 1) - (before >> 1) - 1, 0)


@triton.jit
def _sum_gaps(marks, sums, status, block: tl.constexpr):
    """For RICE: the zeros of the unary part that each block of marks needs."""
    first = tl.program_id(0).to(tl.int64) * block
    count = tl.load(status + COUNT)
    if (first < count) & (tl.load(status + CODING) == _RICE):
        _, gap = _gaps(marks, first + tl.arange(0, block), count)
        tl.store(sums + tl.program_id(0), tl.sum(gap >> tl.load(status + LOW_BITS), axis=0))


@triton.jit(do_not_specialize=["numel"])
def _write(marks, sums, out, status, numel, signed: tl.constexpr, with_values: tl.constexpr, block: tl.constexpr):
    """Write what is listed, after four bytes for each of its elements if ``with_values``."""
    first = tl.program_id(0).to(tl.int64) * block
    at = first + tl.arange(0, block)
    count = tl.load(status + COUNT)
    coding = tl.load(status + CODING)
    written = (coding == _MAP) & signed  # by _spread
    if (first < count) & (not written):
        low_bits = tl.load(status + LOW_BITS)
        inside = at < count
        mark, gap = _gaps(marks, at, count)
        position, sign = mark >> 1, mark & 1
        start = tl.zeros((), tl.int64)
        if with_values:
            start += 32 * count
        if coding == _RICE:
            field = ((gap & ((1 << low_bits) - 1)) << signed) | sign
            width = low_bits + signed
            bit = start + at * width
            _or_bits(out, bit, field & 0xFFFFFFFF, inside)
            _or_bits(out, bit + 32, field >> 32, inside & ((field >> 32) != 0))
            unary = start + 8 * _field_bytes(count, low_bits, signed)
            zeros = gap >> low_bits
            end = add_before(sums, tl.program_id(0), block) + tl.cumsum(zeros, axis=0) + at
            _or_bits(out, unary + end, tl.full((block,), 1, tl.int64), inside)
            # The last element's end is the last bit.
            tl.store(status + NBYTES + 0 * at, (unary + end) // 8 + 1, mask=at == count - 1)
        elif coding == _WORDS:
            _or_bits(out, start + 32 * at, position | (sign << 31), inside)
        elif coding == _GAPS:
            _or_bits(out, start + 16 * at, (gap << 1) | sign, inside)
        else:
            _or_bits(out, start + position, tl.full((block,), 1, tl.int64), inside)


def list_capacity(numel: int) -> int:
    """The most elements a set is listed with, rather than written as a MAP at once."""
    return numel // 8


def scan(counts: Tensor, status: Tensor, numel: int, *, choose: bool) -> None:
    """Make of int64 ``counts`` the sums of those before, and note the total as what passed.

    Args:
        choose: all of it is sent, with signs: choose the coding too.
    """
    _scan[(1,)](counts, status, len(counts), numel, choose, _SCAN_BLOCK)


def spread(
    mask: Tensor, negative: Tensor | None, counts: Tensor, marks: Tensor, out: Tensor, status: Tensor, numel: int
) -> None:
    """List the ones of a bit plane, as many as ``marks`` has room for; a signed set that becomes a MAP is written.

    Args:
        mask: int32, 32 elements a word.
        negative: the signs in the same places, 0 elsewhere; None for an unsigned set.
        counts: how many ones come before every COUNTED_WORDS of the plane.
        marks: int32 or int64, position * 2 + sign.
        out: int32, zeros.
    """
    signs = mask if negative is None else negative
    _spread[grid(len(mask), _WORDS_BLOCK)](
        mask, signs, counts, marks, out, status, numel, len(marks), negative is not None, COUNTED_WORDS, _WORDS_BLOCK
    )


def write_list(marks: Tensor, out: Tensor, status: Tensor, numel: int, *, signed: bool, with_values: bool) -> None:
    """Write the set that is listed in ``marks`` as the status says, unless :func:`spread` did.

    Args:
        out: int32, zeros where the set goes: behind the values, four bytes each, if ``with_values``.
    """
    launch = grid(max(len(marks), 1), _LIST_BLOCK)
    sums = torch.empty(launch[0], dtype=torch.int64, device=marks.device)
    _sum_gaps[launch](marks, sums, status, _LIST_BLOCK)
    _write[launch](marks, sums, out, status, numel, signed, with_values, _LIST_BLOCK)
