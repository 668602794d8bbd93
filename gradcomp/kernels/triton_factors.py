"""Low-rank factors in Triton: the sums in the order of :mod:`gradcomp.kernels.reference_factors`, bit for bit.

The reference adds halves to halves: of ``size`` terms the last ``size // 2`` to the first, which leaves
``ceil(size / 2)``. So after level j there are ``ceil(size / 2**j)``, and a term's place is a sum of such numbers, each
taken or not. With one slot for every such choice, a power of two, each level is a sum of the slots' upper half and
their lower one, in registers; slots without a term hold -0.0, which changes no sum. What does not fit is halved in
memory first. One program does all that for a matrix: the rows of factors are short, and each needs those before it.

:func:`project` and :func:`combine` are what makes factors of a matrix. They read it once each, and add in another order
than torch.matmul, which has none of its own either: float32 sums of n products, off by at most n * 2**-24 of the sum of
their magnitudes, and the same whenever the same device computes them again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels.triton import EXACT

__all__ = ["MOST_RANK", "add_factors", "combine", "norms", "orthonormal", "project"]

MOST_RANK = 8  # of project and combine, whose sums are held in registers

_MOST_SLOTS = 4096  # held in the registers of one program
_TILE = 4096
_MOST_WIDTH = 512
_SUMS = 8192  # in the registers of one program
_PROGRAMS = 1024  # enough to keep a large GPU busy

_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
_NAN: tl.constexpr = tl.constexpr(0x7FC00000)
_DEPENDENT: tl.constexpr = tl.constexpr(2.0**-20)  # as in the reference


@triton.jit
def _sum_halves(terms, size, slots: tl.constexpr, levels: tl.constexpr):
    """The sum of float64 ``terms``, which are overwritten; levels = log2(slots)."""
    tl.debug_barrier()  # they were written by other threads
    at = tl.arange(0, slots)
    while size > slots:
        half = size // 2
        for start in range(0, half, slots):
            lower = start + at
            inside = lower < half
            upper = tl.load(terms + (size - half) + lower, mask=inside)
            tl.store(terms + lower, tl.load(terms + lower, mask=inside) + upper, mask=inside)
        size -= half
        tl.debug_barrier()
    place = tl.zeros((slots,), tl.int32)
    there = place == 0
    for undone in tl.static_range(levels):
        # The lowest bit of a slot was the last to be chosen.
        place += ((at >> undone) & 1) * ((size + (1 << (levels - undone)) - 1) >> (levels - undone))
        there &= place < ((size + (1 << (levels - undone - 1)) - 1) >> (levels - undone - 1))
    values = tl.load(terms + place, mask=there, other=0.0)
    nothing = (tl.full((slots,), 1, tl.int64) << 63).to(tl.float64, bitcast=True)  # -0.0: a literal one would be 0.0
    values = tl.where(there, values, nothing)
    for done in tl.static_range(levels - 1):
        values = tl.sum(tl.reshape(values, (2, slots >> (done + 1))), axis=0)
    total = tl.sum(values, axis=0)
    tl.debug_barrier()  # before the terms are overwritten
    return total


@triton.jit
def _length(row, terms, size, slots: tl.constexpr, levels: tl.constexpr):
    at = tl.arange(0, slots)
    for start in range(0, size, slots):
        inside = start + at < size
        value = tl.load(row + start + at, mask=inside).to(tl.float64)
        tl.store(terms + start + at, value * value, mask=inside)
    return tl.sqrt(_sum_halves(terms, size, slots, levels))


@triton.jit(do_not_specialize=["size"])
def _norms(rows, terms, out, size, slots: tl.constexpr, levels: tl.constexpr):
    row = tl.program_id(0)
    first = row.to(tl.int64) * size
    tl.store(out + row, _length(rows + first, terms + first, size, slots, levels))


@triton.jit(do_not_specialize=["size"])
def _orthonormal(rows, out, wide, terms, rank, size, slots: tl.constexpr, levels: tl.constexpr):
    """``wide``: float64, a copy of ``rows``; ``terms``: room for as many float64 as a row has."""
    at = tl.arange(0, slots)
    for i in range(rank):
        row = wide + i * size
        length = _length(row, terms, size, slots, levels)
        dependent = length <= _length(rows + i * size, terms, size, slots, levels) * _DEPENDENT
        # A row that is all zeros leaves those below as they are, up to the sign of zeros: they are skipped as well.
        divisor = tl.where(dependent, 1.0, length)
        for start in range(0, size, slots):
            inside = start + at < size
            unit = tl.load(row + start + at, mask=inside) / divisor
            unit = tl.where(dependent, 0.0, unit)
            tl.store(row + start + at, unit, mask=inside)
            tl.store(out + i * size + start + at, unit.to(tl.float32), mask=inside)
        tl.debug_barrier()
        if dependent == 0:
            for j in range(i + 1, rank):
                below = wide + j * size
                for start in range(0, size, slots):
                    inside = start + at < size
                    unit = tl.load(row + start + at, mask=inside)
                    tl.store(terms + start + at, tl.load(below + start + at, mask=inside) * unit, mask=inside)
                share = _sum_halves(terms, size, slots, levels)
                for start in range(0, size, slots):
                    inside = start + at < size
                    unit = tl.load(row + start + at, mask=inside)
                    rest = tl.load(below + start + at, mask=inside) - share * unit
                    tl.store(below + start + at, rest, mask=inside)
        tl.debug_barrier()


@triton.jit
def _add_factors(
    out, left, right, addend, rows, columns, across, scale,
    has_addend: tl.constexpr, rank: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row = (tile // across) * height + tl.arange(0, height)
    column = (tile % across) * width + tl.arange(0, width)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.load(out + at, mask=inside)
    if has_addend:
        total += tl.load(addend + at, mask=inside).to(tl.float32)
    down = tl.load(left + row, mask=row < rows, other=0.0)
    values = down[:, None] * tl.load(right + column, mask=column < columns, other=0.0)[None, :]
    for i in range(1, rank):
        down = tl.load(left + i * rows + row, mask=row < rows, other=0.0)
        values += down[:, None] * tl.load(right + i * columns + column, mask=column < columns, other=0.0)[None, :]
    tl.store(out + at, total + values * scale, mask=inside)


@triton.jit
def _matrix(grad, residual, row, column, rows, columns, has_residual: tl.constexpr):
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    acc = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if has_residual:
        acc = tl.load(residual + at, mask=inside, other=0.0) + acc
    return acc


@triton.jit
def _factor(values, which, at, rank, size):
    """[ranks, elements] of a factor [rank, size]."""
    inside = (which < rank)[:, None] & (at < size)[None, :]
    return tl.load(values + which[:, None] * size + at[None, :], mask=inside, other=0.0)


@triton.jit
def _project(
    grad, residual, right, out, rows, columns, rank,
    has_residual: tl.constexpr, ranks: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * height + tl.arange(0, height)
    which = tl.arange(0, ranks)
    sums = tl.zeros((height, ranks, width), tl.float32)
    most = tl.zeros((height, width), tl.int32)
    for start in range(0, columns, width):
        column = start + tl.arange(0, width)
        acc = _matrix(grad, residual, row, column, rows, columns, has_residual)
        most = tl.maximum(most, acc.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        sums += acc[:, None, :] * _factor(right, which, column, rank, columns)[None, :, :]
    total = tl.sum(sums, axis=2)
    nan = tl.full((height, ranks), _NAN, tl.int32).to(tl.float32, bitcast=True)
    total = tl.where((tl.max(most, axis=1) >= _INFINITY)[:, None], nan, total)
    inside = (row < rows)[:, None] & (which < rank)[None, :]
    tl.store(out + which[None, :] * rows + row[:, None], total, mask=inside)


@triton.jit
def _combine(
    grad, residual, left, out, rows, columns, rank, across, rows_each,
    has_residual: tl.constexpr, ranks: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(0) % across) * width + tl.arange(0, width)
    part = tl.program_id(0) // across
    which = tl.arange(0, ranks)
    sums = tl.zeros((ranks, height, width), tl.float32)
    for start in range(part * rows_each, tl.minimum((part + 1) * rows_each, rows), height):
        row = start + tl.arange(0, height)
        acc = _matrix(grad, residual, row, column, rows, columns, has_residual)
        sums += _factor(left, which, row, rank, rows)[:, :, None] * acc[None, :, :]
    inside = (which < rank)[:, None] & (column < columns)[None, :]
    at = (part * rank + which).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + at, tl.sum(sums, axis=1), mask=inside)


def orthonormal(rows: Tensor) -> Tensor:
    """:func:`gradcomp.kernels.reference.orthonormal`, bit for bit; waits for nothing."""
    rows = rows.contiguous()
    rank, size = rows.shape
    out = torch.empty_like(rows)
    if out.numel():
        terms = torch.empty(size, dtype=torch.float64, device=rows.device)
        slots, levels, warps = _slots(size)
        _orthonormal[(1,)](
            rows, out, rows.to(torch.float64), terms, rank, size, slots, levels, num_warps=warps, **EXACT
        )
    return out


def norms(rows: Tensor) -> Tensor:
    """:func:`gradcomp.kernels.reference.norms`, bit for bit; of float32 [r, m], m at least 1."""
    rows = rows.contiguous()
    count, size = rows.shape
    out = torch.empty(count, dtype=torch.float64, device=rows.device)
    if count:
        slots, levels, warps = _slots(size)
        terms = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
        _norms[(count,)](rows, terms, out, size, slots, levels, num_warps=warps, **EXACT)
    return out


def add_factors(out: Tensor, left: Tensor, right: Tensor, scale: float, addend: Tensor | None = None) -> None:
    """:func:`gradcomp.kernels.reference.add_factors`, bit for bit."""
    if not out.numel():
        return
    rank, rows = left.shape
    columns = right.shape[1]
    width = min(triton.next_power_of_2(columns), _MOST_WIDTH)
    height = _TILE // width
    across = -(-columns // width)
    _add_factors[(-(-rows // height) * across,)](
        out, left.contiguous(), right.contiguous(), out if addend is None else addend, rows, columns, across, scale,
        addend is not None, rank, height, width, num_warps=8, **EXACT,
    )  # fmt: skip


def project(grad: Tensor, residual: Tensor | None, right: Tensor) -> Tensor:
    """:func:`gradcomp.kernels.project`, of rank :data:`MOST_RANK` at most; waits for nothing."""
    rank, columns = right.shape
    rows = grad.numel() // columns
    out = torch.empty((rank, rows), dtype=torch.float32, device=grad.device)
    ranks, height, width = _sides(rank, columns)
    _project[(-(-rows // height),)](
        grad, grad if residual is None else residual, right.contiguous(), out, rows, columns, rank,
        residual is not None, ranks, height, width, num_warps=8,
    )  # fmt: skip
    return out


def combine(grad: Tensor, residual: Tensor | None, left: Tensor) -> Tensor:
    """:func:`gradcomp.kernels.combine`, of rank :data:`MOST_RANK` at most; waits for nothing."""
    rank, rows = left.shape
    columns = grad.numel() // rows
    ranks, height, width = _sides(rank, columns)
    across = -(-columns // width)
    parts = min(max(_PROGRAMS // across, 1), -(-rows // height))
    rows_each = -(-rows // (parts * height)) * height
    parts = -(-rows // rows_each)
    out = torch.empty((parts, rank, columns), dtype=torch.float32, device=grad.device)
    _combine[(parts * across,)](
        grad, grad if residual is None else residual, left.contiguous(), out, rows, columns, rank, across, rows_each,
        residual is not None, ranks, height, width, num_warps=8,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def _sides(rank: int, columns: int) -> tuple[int, int, int]:
    """Ranks as a power of two, rows and columns of a tile."""
    ranks = triton.next_power_of_2(rank)
    size = min(_SUMS // ranks, _TILE)
    width = min(triton.next_power_of_2(columns), _MOST_WIDTH)
    return ranks, size // width, width


def _slots(size: int) -> tuple[int, int, int]:
    """Slots, their levels, and warps."""
    slots = min(max(triton.next_power_of_2(size), 2), _MOST_SLOTS)
    return slots, slots.bit_length() - 1, min(max(slots // 256, 1), 8)
