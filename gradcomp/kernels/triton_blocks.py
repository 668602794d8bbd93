"""What the Triton kernels of blocks share: which elements a program has, packed codes, and acc that must be finite.

A block of at most ``_TILE`` elements lies in one program, beside others if it is small; a larger one is spread over
several. Where launches are to be tuned: ``_TILE`` and ``num_warps``, 32 elements a thread now.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels.reference_chunks import accumulate, chunks, nonfinite_value
from gradcomp.kernels.triton import grid

__all__ = [
    "INFINITY",
    "MAGNITUDE",
    "TILE",
    "Layout",
    "check_gradient",
    "load_acc",
    "magnitude_of",
    "nonfinite_sum",
    "pack",
    "place",
    "status_of",
    "unpack",
]

TILE = 4096
MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # all bits of a float32 but the sign
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)  # the magnitude of Inf; that of NaN is above
# 2**102. A smaller number added to any finite float32 rounds to a finite float32.
_HARMLESS: tl.constexpr = tl.constexpr((102 + 127) << 23)


@dataclass(frozen=True)
class Layout:
    """How blocks of ``block`` elements lie in programs: ``rows`` of them in each, or ``tiles`` programs for each.

    Attributes:
        block: a multiple of 8.
        width: the elements of a row, a power of 2; those beyond the block are not used.
        blocks: how many there are.
        grid: for a launch.
    """

    block: int
    rows: int
    width: int
    tiles: int
    blocks: int
    grid: tuple[int]

    @classmethod
    def of(cls, numel: int, block: int) -> Layout:
        blocks = -(-numel // block)
        if block > TILE:
            tiles = -(-min(block, numel) // TILE)
            return cls(block, 1, TILE, tiles, blocks, (blocks * tiles,))
        width = 1 << (block - 1).bit_length()
        rows = TILE // width
        return cls(block, rows, width, 1, blocks, (-(-blocks // rows),))

    @classmethod
    def whole(cls, numel: int) -> Layout:
        """One block of all."""
        return cls.of(numel, max(-(-numel // 8) * 8, 2 * TILE))


@triton.jit
def place(numel, block, tiles, rows: tl.constexpr, width: tl.constexpr):
    """A program's first element; [rows, width] of its elements, counted from there, and which exist; its blocks."""
    program = tl.program_id(0).to(tl.int64)
    first = program // tiles * rows
    skipped = program % tiles * width  # of the block: of several tiles' if there are several
    start = first * block + skipped
    column = tl.arange(0, width)
    offset = tl.arange(0, rows)[:, None] * block + column[None, :]
    inside = (column < block - skipped)[None, :] & (offset < numel - start)
    return start, offset, inside, first + tl.arange(0, rows)


@triton.jit
def load_acc(grad, residual, at, inside, has_residual: tl.constexpr):
    acc = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if has_residual:
        acc = tl.load(residual + at, mask=inside, other=0.0) + acc
    return acc


@triton.jit
def magnitude_of(values):
    """The bits of float32s without their signs: in order, INFINITY and above where not finite."""
    return values.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def pack(target, codes, start, block, offset, inside, bits: tl.constexpr, rows: tl.constexpr, width: tl.constexpr):
    """Write int32 codes, 0 where not inside, lowest bits first. ``start`` and ``block`` are multiples of 8."""
    target += start // 8 * bits
    row = tl.arange(0, rows)[:, None] * (block // 8 * bits)
    if bits == 8:
        tl.store(target + offset, codes.to(tl.uint8), mask=inside)
    elif 8 % bits == 0:
        each: tl.constexpr = 8 // bits
        count: tl.constexpr = width // each
        shifted = tl.reshape(codes, [rows, count, each]) << (tl.arange(0, each) * bits)[None, None, :]
        exists = tl.max(tl.reshape(inside.to(tl.int32), [rows, count, each]), axis=2) > 0
        tl.store(target + row + tl.arange(0, count)[None, :], tl.sum(shifted, axis=2).to(tl.uint8), mask=exists)
    else:
        groups: tl.constexpr = width // 8
        member = tl.arange(0, 8)[None, None, :]
        shifted = tl.reshape(codes, [rows, groups, 8]).to(tl.int64) << member.to(tl.int64) * bits
        words = tl.sum(shifted, axis=2)
        members = tl.sum(tl.reshape(inside.to(tl.int32), [rows, groups, 8]), axis=2)
        at = row[:, :, None] + (tl.arange(0, groups) * bits)[None, :, None] + member
        exists = (member < bits) & (member * 8 < members[:, :, None] * bits)
        tl.store(target + at, (words[:, :, None] >> member.to(tl.int64) * 8).to(tl.uint8), mask=exists)


@triton.jit
def unpack(packed, start, offset, inside, bits: tl.constexpr):
    """The codes :func:`pack` wrote, as int32."""
    packed += start // 8 * bits
    if bits == 8:
        codes = tl.load(packed + offset, mask=inside, other=0).to(tl.int32)
    else:
        at = offset.to(tl.int64) * bits
        shift = (at & 7).to(tl.int32)
        codes = tl.load(packed + (at >> 3), mask=inside, other=0).to(tl.int32)
        if 8 % bits != 0:
            beyond = tl.load(packed + (at >> 3) + 1, mask=inside & (shift + bits > 8), other=0).to(tl.int32)
            codes = codes | beyond << 8
        codes = (codes >> shift) & ((1 << bits) - 1)
    return codes


@triton.jit
def _check_gradient(grad, residual, status, numel, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < numel
    value = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if tl.max(magnitude_of(value), axis=0) >= _HARMLESS:
        acc = tl.load(residual + at, mask=inside, other=0.0) + value
        if tl.max(magnitude_of(acc), axis=0) >= INFINITY:
            tl.store(status, 1)  # whichever program comes first: all write the same


def status_of(grad: Tensor) -> Tensor:
    """Two int32 that become 1 if acc is not finite: the first before the residual is written, the second meanwhile."""
    return torch.zeros(2, dtype=torch.int32, device=grad.device)


def check_gradient(grad: Tensor, residual: Tensor, status: Tensor) -> None:
    """Set the first of ``status`` if acc is not finite; a finite residual is read only beside very large gradients."""
    if grad.numel():
        _check_gradient[grid(grad.numel(), TILE)](grad, residual, status, grad.numel(), TILE)


def nonfinite_sum(grad: Tensor, residual: Tensor | None) -> float:
    """What is not finite in acc, added up: what the kernels return in place of a payload."""
    whole = chunks(grad.numel(), grad.device)
    return sum(nonfinite_value(accumulate(grad, residual, part, None)) for part in whole)
