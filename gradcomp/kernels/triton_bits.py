"""One bit an element in Triton: a block's sums, its bits and what they leave in the residual, in one sweep.

That is where a block fits a program. A larger one takes two, one for its sums. Those of its runs, which are added up in
the reference's order, one after the other: cheap, unless a block has tens of millions of elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels.triton import EXACT
from gradcomp.kernels.triton_blocks import (
    INFINITY,
    TILE,
    Layout,
    check_gradient,
    load_acc,
    magnitude_of,
    nonfinite_sum,
    pack,
    place,
    status_of,
)
from gradcomp.kernels.triton_codes import add_pairs as add_bits

__all__ = ["add_bits", "code_bits", "encode_bits", "pack_signs", "pack_votes"]

_RUN: tl.constexpr = tl.constexpr(512)  # elements whose sum is a float32's
_AT_ONCE: tl.constexpr = tl.constexpr(8)  # runs that are loaded together; those of a tile are a multiple
_SCALE_DOWN: tl.constexpr = tl.constexpr(2.0**-40)
_SCALE_UP: tl.constexpr = tl.constexpr(2.0**40)
_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
_FINITE: tl.constexpr = tl.constexpr(1e300)  # a float64 that is a sum of float32s is below, or not finite


@triton.jit
def _is_finite(total):
    return tl.abs(total) < _FINITE


@triton.jit
def _fold(lanes, units: tl.constexpr, count: tl.constexpr):
    """[units, count], 8 or 16, to [units]. Of two numbers, tl.sum has but one order."""
    if count == 16:
        lanes = tl.sum(tl.reshape(lanes, [units, 2, 8]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [units, 2, 4]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [units, 2, 2]), axis=1)
    return tl.sum(tl.reshape(lanes, [units, 2]), axis=1)


@triton.jit
def _sum_runs(
    grad, residual, start, numel, block, left, factor,
    has_residual: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """[rows * runs]: the sums of the negative elements of each run of a program, and of the others, times factor.

    ``left`` is how many elements of the block begin at ``start``. What is loaded is, or soon will be, in the cache: the
    program loads it another time in the order in which it is stored.
    """
    runs: tl.constexpr = (width + _RUN - 1) // _RUN
    units: tl.constexpr = rows * runs
    lanes: tl.constexpr = 16 if width >= 16 else 8  # the others stay 0
    steps: tl.constexpr = width // runs // lanes
    unit = tl.arange(0, units)[:, None]
    lane = tl.arange(0, lanes)[None, :]
    below = tl.zeros([units, lanes], tl.float32)
    above = tl.zeros([units, lanes], tl.float32)
    at_once: tl.constexpr = 8 if steps > 8 else steps
    for begin in range(0, steps, at_once):
        for step in tl.static_range(at_once):  # so many loads are under way together
            column = unit % runs * _RUN + (begin + step) * lanes + lane
            offset = unit // runs * block + column
            inside = (column < left) & (offset < numel - start)
            acc = load_acc(grad, residual, start + offset, inside, has_residual)
            negative = acc < 0
            acc = acc * factor
            below += tl.where(negative, acc, 0.0)
            above += tl.where(negative, 0.0, acc)
    return _fold(below, units, lanes), _fold(above, units, lanes)


@triton.jit
def _sum_rows(sums, rows: tl.constexpr, width: tl.constexpr):
    """[rows], float64: the sums of runs, in order."""
    runs: tl.constexpr = (width + _RUN - 1) // _RUN
    sums = tl.reshape(sums, [rows, runs])
    total = tl.zeros([rows], tl.float64)
    for run in tl.static_range(runs):
        chosen = tl.where(tl.arange(0, runs)[None, :] == run, sums, 0.0)  # one is not 0
        total += tl.sum(chosen, axis=1).to(tl.float64)
    return total


@triton.jit
def _as_float32(mean):
    """Rounded, the mean of the largest float32s may be larger than they are."""
    return tl.minimum(tl.maximum(mean, -_LARGEST), _LARGEST).to(tl.float32)


@triton.jit
def _scales(below, above, negatives, members, symmetric: tl.constexpr):
    """What a block's 1 and 0 stand for."""
    if symmetric:
        zero = _as_float32((above - below) / tl.maximum(members, 1).to(tl.float64))
        one = 0.0 - zero
    else:
        one = _as_float32(below / tl.maximum(negatives, 1).to(tl.float64))
        zero = _as_float32(above / tl.maximum(members - negatives, 1).to(tl.float64))
    return one, zero


@triton.jit
def _encode(
    grad, residual, scales, bits, status, numel, block, tiles,
    symmetric: tl.constexpr, has_residual: tl.constexpr, update: tl.constexpr, measured: tl.constexpr,
    rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    start, offset, inside, row = place(numel, block, tiles, rows, width)
    exists = row * block < numel
    acc = load_acc(grad, residual, start + offset, inside, has_residual)
    negative = (acc < 0).to(tl.int32)
    if not measured:
        below, above = _sum_runs(grad, residual, start, numel, block, block, 1.0, has_residual, rows, width)
        below, above = _sum_rows(below, rows, width), _sum_rows(above, rows, width)
        if tl.min((_is_finite(below) & _is_finite(above)).to(tl.int32), axis=0) == 0:
            # The sum of finite numbers may not be a float32.
            less, more = _sum_runs(grad, residual, start, numel, block, block, _SCALE_DOWN, has_residual, rows, width)
            less, more = _sum_rows(less, rows, width) * _SCALE_UP, _sum_rows(more, rows, width) * _SCALE_UP
            below, above = tl.where(_is_finite(below), below, less), tl.where(_is_finite(above), above, more)
        fine = _is_finite(below) & _is_finite(above)
        if tl.min(fine.to(tl.int32), axis=0) == 0:
            tl.store(status + 1, 1)  # whichever program comes first: all write the same
        members = tl.minimum(numel - row * block, block)
        one, zero = _scales(below, above, tl.sum(negative, axis=1), members, symmetric)
        tl.store(scales + 2 * row, tl.where(fine, one, float("nan")), mask=exists)
        tl.store(scales + 2 * row + 1, zero, mask=exists)
    pack(bits, negative, start, block, offset, inside, 1, rows, width)
    if update:
        # The scales come back through memory, or the compiler would spread acc over the threads as the sums are, a row
        # to each, in far more registers than there are. The barrier makes them visible to all of the program.
        if not measured:
            tl.debug_barrier()
        one = tl.load(scales + 2 * row, mask=exists, other=0.0)[:, None]
        zero = tl.load(scales + 2 * row + 1, mask=exists, other=0.0)[:, None]
        if tl.load(status) == 0:
            left = acc - tl.where(negative != 0, one, zero)
            tl.store(residual + start + offset, left, mask=inside & (one == one))


@triton.jit
def _sum_tiles(
    grad, residual, sums, totals, negatives, numel, block, tiles,
    again: tl.constexpr, has_residual: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """The sums of the runs of blocks larger than a program; ``again``: where they overflowed, those of less."""
    start, offset, inside, row = place(numel, block, tiles, 1, width)
    first = tl.program_id(0).to(tl.int64) // tiles
    wanted = 1
    if again:
        whole = _is_finite(tl.load(totals + 2 * first)) & _is_finite(tl.load(totals + 2 * first + 1))
        wanted = 1 - whole.to(tl.int32)
    else:
        acc = load_acc(grad, residual, start + offset, inside, has_residual)
        tl.atomic_add(negatives + row, tl.sum((acc < 0).to(tl.int32), axis=1))
    if wanted != 0:
        left = (first + 1) * block - start
        factor = _SCALE_DOWN if again else 1.0
        below, above = _sum_runs(grad, residual, start, numel, block, left, factor, has_residual, 1, width)
        runs: tl.constexpr = width // _RUN
        at = tl.program_id(0).to(tl.int64) * runs + tl.arange(0, runs)
        tl.store(sums + 2 * at, below)
        tl.store(sums + 2 * at + 1, above)


@triton.jit
def _sum_blocks(sums, totals, runs, again: tl.constexpr):
    """Adds up the runs of a block, in order."""
    block = tl.program_id(0).to(tl.int64)
    wanted, below_before, above_before = 1, 0.0, 0.0
    if again:
        below_before, above_before = tl.load(totals + 2 * block), tl.load(totals + 2 * block + 1)
        wanted = 1 - (_is_finite(below_before) & _is_finite(above_before)).to(tl.int32)
    if wanted != 0:
        sums += 2 * block * runs
        below = tl.zeros([], tl.float64)
        above = tl.zeros([], tl.float64)
        for run in range(0, runs, _AT_ONCE):
            for k in tl.static_range(_AT_ONCE):
                below += tl.load(sums + 2 * (run + k)).to(tl.float64)
                above += tl.load(sums + 2 * (run + k) + 1).to(tl.float64)
        if again:
            below = tl.where(_is_finite(below_before), below_before, below * _SCALE_UP)
            above = tl.where(_is_finite(above_before), above_before, above * _SCALE_UP)
        tl.store(totals + 2 * block, below)
        tl.store(totals + 2 * block + 1, above)


@triton.jit
def _scale_blocks(
    totals, negatives, scales, status, numel, block, blocks, symmetric: tl.constexpr, width: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    exists = row < blocks
    below = tl.load(totals + 2 * row, mask=exists, other=0.0)
    above = tl.load(totals + 2 * row + 1, mask=exists, other=0.0)
    if tl.min((_is_finite(below) & _is_finite(above)).to(tl.int32), axis=0) == 0:
        tl.store(status, 1)
    members = tl.minimum(numel - row * block, block)
    one, zero = _scales(below, above, tl.load(negatives + row, mask=exists, other=0), members, symmetric)
    tl.store(scales + 2 * row, one, mask=exists)
    tl.store(scales + 2 * row + 1, zero, mask=exists)


@triton.jit
def _pack_signs(grad, target, found, numel, block, tiles, votes: tl.constexpr, width: tl.constexpr):
    start, offset, inside, _ = place(numel, block, tiles, 1, width)
    value = tl.load(grad + start + offset, mask=inside, other=0.0).to(tl.float32)
    negative = (value < 0).to(tl.int32)
    if votes:
        pack(target, (value > 0).to(tl.int32) + 2 * negative, start, block, offset, inside, 2, 1, width)
    else:
        pack(target, negative, start, block, offset, inside, 1, 1, width)
        zeros = tl.sum(tl.sum((inside & (value == 0)).to(tl.int32), axis=1), axis=0)
        if zeros > 0:
            tl.atomic_add(found, zeros.to(tl.int64))
        if tl.max(tl.max(magnitude_of(value), axis=1), axis=0) >= INFINITY:
            tl.store(found + 1, 1)  # whichever program comes first: all write the same


def code_bits(
    grad: Tensor, residual: Tensor | None, block: int, symmetric: bool, update: bool
) -> tuple[Tensor, Tensor]:
    """:func:`encode_bits` without ever waiting for the device.

    Returns:
        The payload, and two int32: if one of them is not 0, acc is not finite, and the payload is worth nothing.
    """
    numel, update = grad.numel(), update and residual is not None
    layout = Layout.of(numel, block)
    nbytes = 8 * layout.blocks
    payload = torch.empty(nbytes + -(-numel // 8), dtype=torch.uint8, device=grad.device)
    status = status_of(grad)
    if not numel:
        return payload, status
    other, scales = grad if residual is None else residual, payload[:nbytes].view(torch.float32)
    if layout.tiles > 1:
        _measure(grad, residual, scales, status, layout, symmetric)
    elif update:
        check_gradient(grad, other, status)
    _encode[layout.grid](
        grad, other, scales, payload[nbytes:], status, numel, layout.block, layout.tiles,
        symmetric, residual is not None, update, layout.tiles > 1, layout.rows, layout.width, **EXACT,
    )  # fmt: skip
    return payload, status


def _measure(
    grad: Tensor, residual: Tensor | None, scales: Tensor, status: Tensor, layout: Layout, symmetric: bool
) -> None:
    """The scales of blocks larger than a program."""
    numel, other = grad.numel(), grad if residual is None else residual
    runs = layout.tiles * (layout.width // 512)
    sums = torch.empty(2 * layout.blocks * runs, dtype=torch.float32, device=grad.device)
    totals = torch.empty(2 * layout.blocks, dtype=torch.float64, device=grad.device)
    negatives = torch.zeros(layout.blocks, dtype=torch.int32, device=grad.device)
    for again in (False, True):
        _sum_tiles[layout.grid](
            grad, other, sums, totals, negatives, numel, layout.block, layout.tiles,
            again, residual is not None, layout.width, **EXACT,
        )  # fmt: skip
        _sum_blocks[(layout.blocks,)](sums, totals, runs, again, num_warps=1, **EXACT)
    _scale_blocks[(-(-layout.blocks // 128),)](
        totals, negatives, scales, status, numel, layout.block, layout.blocks, symmetric, 128, **EXACT
    )


def encode_bits(
    grad: Tensor,
    residual: Tensor | None,
    block: int,
    symmetric: bool = False,
    update: bool = False,
) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_bits`, bit for bit."""
    payload, status = code_bits(grad, residual, block, symmetric, update)
    return nonfinite_sum(grad, residual) if any(status.tolist()) else payload


def pack_signs(grad: Tensor) -> tuple[Tensor, int] | float:
    """:func:`gradcomp.kernels.reference.pack_signs`, bit for bit."""
    bits = torch.empty(-(-grad.numel() // 8), dtype=torch.uint8, device=grad.device)
    found = torch.zeros(2, dtype=torch.int64, device=grad.device)
    _launch_signs(grad, bits, found, votes=False)
    zeros, bad = found.tolist()
    return nonfinite_sum(grad, None) if bad else (bits, zeros)


def pack_votes(grad: Tensor) -> Tensor:
    """:func:`gradcomp.kernels.reference.pack_votes`, bit for bit; never waits for the device."""
    codes = torch.empty(-(-grad.numel() // 4), dtype=torch.uint8, device=grad.device)
    _launch_signs(grad, codes, codes, votes=True)
    return codes


def _launch_signs(grad: Tensor, target: Tensor, found: Tensor, *, votes: bool) -> None:
    numel = grad.numel()
    if numel:
        layout = Layout.whole(numel)
        _pack_signs[layout.grid](grad, target, found, numel, layout.block, layout.tiles, votes, TILE)
