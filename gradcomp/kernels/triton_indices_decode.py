"""Coded index sets, decoded or added to a vector straight from their bytes, in Triton.

Two launches over the payload, whatever the size of the vector: :meth:`CodedSet.survey` sums up each chunk, then each
program looks up what came before its own chunk and takes the elements. WORDS need no sums; a MAP, which has a bit for
every element, is a sweep over them all. Nothing is written before the set is checked, which waits for the device, or
known to be checked, and then nothing waits.

A set's elements are distinct, so each is added once, in whatever order: the bits are the reference's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels.reference_indices import Coding
from gradcomp.kernels.triton import EXACT
from gradcomp.kernels.triton_indices_check import VARY, CodedSet, fields_of

__all__ = ["add_signs", "add_values", "decode"]

# Up to so many chunks each program adds up those before its own, which takes less than another launch; beyond, torch
# makes running sums of them first.
_MANY = 4096
_STRIDE: tl.constexpr = tl.constexpr(1024)  # how many of them at a time
_MAP_WARPS = 8  # with 4 a thread needs 160 registers, and too few fit a processor to hide how far memory is


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
def _bit(payload, at, mask):
    """Bit ``at`` of the payload, as int32; 0 where the mask is."""
    byte = tl.load(payload + (at >> 3), mask=mask, other=0).to(tl.int32)
    return (byte >> (at & 7).to(tl.int32)) & 1


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


@triton.jit(do_not_specialize=VARY)
def _take_words(payload, out, values, plus, minus, count, sink: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    word = tl.load(payload + at, mask=at < count, other=0)
    position = (word & 0x7FFFFFFF).to(tl.int64)
    _put(sink, out, values, plus, minus, at, position, (word >> 31) & 1, at < count)


@triton.jit(do_not_specialize=VARY)
def _take_gaps(
    payload, totals, out, values, plus, minus, count, scanned: tl.constexpr, sink: tl.constexpr, block: tl.constexpr
):
    chunk = tl.program_id(0)
    at = chunk.to(tl.int64) * block + tl.arange(0, block)
    unit = tl.load(payload + at, mask=at < count, other=0).to(tl.int32) & 0xFFFF
    position = _sum_before(totals, chunk, scanned) + tl.cumsum((unit >> 1) + 1, axis=0) - 1
    _put(sink, out, values, plus, minus, at, position, unit & 1, at < count)


@triton.jit(do_not_specialize=VARY)
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
    ends = _bit(payload + fields_nbytes, bit, (bit >> 3) < nbytes - fields_nbytes)
    first = _sum_before(totals, chunk, scanned)
    element = first + tl.cumsum(ends, axis=0) - 1
    field = fields_of(payload, nbytes, element, ends != 0, width, touched)
    low = tl.cumsum(tl.where(ends != 0, field >> signed, 0), axis=0)
    # The low bits before these: of whole chunks, and of the elements of one that end in another chunk than this.
    whole = first // block
    earlier = whole * block + tl.arange(0, block)
    fields = fields_of(payload, nbytes, earlier, earlier < first, width, touched)
    low += tl.sum(tl.where(earlier < first, fields >> signed, 0), axis=0)
    low += _sum_before(totals + chunks, whole.to(tl.int32), scanned)
    position = ((bit - element) << low_bits) + low + element
    negative = field & 1 if signed else tl.zeros_like(field)
    _put(sink, out, values, plus, minus, element, position, negative, ends != 0)


@triton.jit(do_not_specialize=VARY)
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
    negative = _bit(payload + signs_at, rank, named != 0) if signed else tl.zeros_like(named)
    if sink == "list":
        _put(sink, out, values, plus, minus, rank, at, negative, named != 0)
    else:  # All of them, in whole vectors: of eight elements beside each other one or more is named, as a rule.
        before = tl.load(out + at, mask=at < numel)
        total = before + _term(sink, values, plus, minus, rank, negative, named != 0)
        tl.store(out + at, tl.where(named != 0, total, before), mask=at < numel)


def decode(
    payload: Tensor, count: int, numel: int, coding: Coding, *, signed: bool, checked: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`gradcomp.indices.decode`, with the reference's results and errors.

    Args:
        checked: whether the payload was checked: nothing then waits for the device.
    """
    coded = CodedSet(payload, count, numel, coding, signed)
    if not checked:
        coded.check()
    index = torch.empty(count, dtype=torch.int64, device=payload.device)
    negative = torch.empty(count, dtype=torch.bool, device=payload.device)
    _take(coded, "list", index, negative.view(torch.uint8), 0.0, 0.0)
    return index, negative


def add_signs(
    out: Tensor, payload: Tensor, count: int, coding: Coding, magnitude: float, *, checked: bool = False
) -> None:
    """:func:`gradcomp.kernels.reference.add_signs`, bit for bit.

    Args:
        checked: whether the payload was checked for a vector as long as ``out``: nothing then waits for the device.
    """
    coded = CodedSet(payload, count, out.numel(), coding, True)
    if not checked:
        coded.check()
    _take(coded, "signs", out, out, float(magnitude), -float(magnitude))


def add_values(
    out: Tensor, payload: Tensor, count: int, coding: Coding, values: Tensor, scale: float, *, checked: bool = False
) -> None:
    """:func:`gradcomp.kernels.reference.add_values`, bit for bit; ``checked`` as in :func:`add_signs`."""
    if values.numel() != count:
        raise ValueError(f"values must be {count}, as count says; got {values.numel()}")
    coded = CodedSet(payload, count, out.numel(), coding, False)
    if not checked:
        coded.check()
    _take(coded, "values", out, values, float(scale), 0.0)


def _take(coded: CodedSet, sink: str, out: Tensor, values: Tensor, plus: float, minus: float) -> None:
    """Do with each element of a checked set what :func:`_put` does for this sink."""
    if not coded.count:
        return
    payload, chunks, block, signed = coded.payload, coded.chunks, coded.block, int(coded.signed)
    target = out, values, plus, minus
    if coded.coding is Coding.WORDS:
        _take_words[(chunks,)](payload.view(torch.int32), *target, coded.count, sink, block, **EXACT)
        return
    totals, scanned = coded.survey(), chunks > _MANY
    if scanned:
        totals = totals.cumsum(1)
    if coded.coding is Coding.GAPS:
        units = payload.view(torch.int16)
        _take_gaps[(chunks,)](units, totals, *target, coded.count, scanned, sink, block, **EXACT)
    elif coded.coding is Coding.RICE:
        sizes = payload.numel(), coded.fields_nbytes, coded.width, coded.low_bits, chunks
        _take_rice[(chunks,)](payload, totals, *target, *sizes, signed, coded.touched, scanned, sink, block, **EXACT)
    else:
        sizes_of_map = coded.numel, coded.map_nbytes
        _take_map[(chunks,)](
            payload, totals, *target, *sizes_of_map, signed, scanned, sink, block, num_warps=_MAP_WARPS, **EXACT
        )
