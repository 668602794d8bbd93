"""The stochastic quantizers in Triton: bytes, residuals and results of the reference, bit for bit.

What a block's scale is made of is known only when the block was read. Where blocks are powers of two of at most a tile,
have their largest magnitude as norm, and the residual stays as it is, one sweep is enough. Else there are two: what the
norms are made of and whether acc is finite, then codes and the residual, which is written only if it was. So nothing
waits for the host before all is done. A sum of squares is made of runs' sums, added up in their order: where one block
is as large as the whole tensor, adding up one float64 for every 512 elements is a single thread's work.

``code_*`` never wait: their arguments' sizes say how large the payload is. They return it and two
int32: if one of them is not 0, acc is not finite, and the payload is worth nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels.reference_stochastic import stochastic_limit
from gradcomp.kernels.triton import EXACT, grid
from gradcomp.kernels.triton_blocks import INFINITY, TILE, load_acc, magnitude_of, nonfinite_sum, status_of
from gradcomp.kernels.triton_codes import add_powers
from gradcomp.kernels.triton_random import draw, new_stream

__all__ = ["add_powers", "code_powers", "code_stochastic", "encode_powers", "encode_stochastic"]

_RUN = 512  # of reference_sums
_RUNS = 64  # in one program
_BLOCKS = 32
_WARPS = 8

_MANTISSA: tl.constexpr = tl.constexpr(0x7FFFFF)
_TINY: tl.constexpr = tl.constexpr(0x00800000)  # the bits of the smallest normal number
_AHEAD: tl.constexpr = tl.constexpr(16)  # runs whose sums are on their way together
_CHANCE: tl.constexpr = tl.constexpr(2.0**-16)
_HALF_CHANCE: tl.constexpr = tl.constexpr(2.0**-17)


@triton.jit
def _level_scale(bound, levels: tl.constexpr, limit: tl.constexpr):
    """Scales and what to multiply by, of blocks whose norms are ``bound``, float64."""
    scale = tl.minimum(bound / levels, limit).to(tl.float32)
    scale = tl.where(magnitude_of(scale) < _TINY, 0.0, scale)
    inverse = 1.0 / tl.where(scale > 0, scale, 1.0).to(tl.float64)
    return scale, tl.where(scale > 0, inverse, 0.0).to(tl.float32)


@triton.jit
def _power_scale(largest):
    """The same for powers of two, of the bits of the largest magnitudes."""
    top = (tl.minimum(largest, INFINITY - 1) + _MANTISSA) >> 23
    top = tl.minimum(tl.maximum(top, 127), 254)
    inverse = tl.maximum((254 - top) << 23, 1 << 22)
    return (top << 23).to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def _quantize(acc, scale, inverse, half, levels: tl.constexpr, bits: tl.constexpr):
    """Codes and what they stand for; ``levels`` 0: powers of two."""
    magnitude = tl.abs(acc) * inverse
    if levels == 0:
        exponent = tl.minimum((magnitude_of(magnitude) + (half << 7) + 64) >> 23, 127)
        sign = ((acc < 0) & (exponent > 0)).to(tl.int32)
        code = (127 - exponent) | (sign << 7)
        decoded = ((exponent << 23) | (sign << 31)).to(tl.float32, bitcast=True) * scale
    else:
        chance = half.to(tl.float32) * _CHANCE + _HALF_CHANCE
        level = (tl.minimum(magnitude, levels * 1.0) + chance).to(tl.int32)
        signed = tl.where(acc < 0, -level, level)
        decoded = scale * signed.to(tl.float32)
        code = tl.where(acc < 0, 2 * level, level) if bits == 2 else signed + ((1 << (bits - 1)) - 1)
    return code, decoded


@triton.jit
def _store_codes(codes, code, start, numel, bits: tl.constexpr, width: tl.constexpr, tile: tl.constexpr):
    """``bits`` bits each, lowest first; ``width``: the power of two from ``bits`` on.

    As triton_blocks.pack for a single row, whose masks and layouts made the kernels here a third longer.
    """
    at = start + tl.arange(0, tile)
    if bits == 8:
        tl.store(codes + at, code.to(tl.uint8), mask=at < numel)
    else:
        kept = tl.where(at < numel, code, 0)
        if bits > 3:
            kept = kept.to(tl.int64)
        words = tl.sum(tl.reshape(kept, (tile // 8, 8)) << (bits * tl.arange(0, 8))[None, :], axis=1)
        byte = tl.arange(0, width)[None, :]
        position = tl.arange(0, tile // 8)[:, None] * bits + byte
        inside = (byte < bits) & (position < ((numel - start) * bits + 7) // 8)
        first = start // 8 * bits
        tl.store(codes + first + position, ((words[:, None] >> (8 * byte)) & 0xFF).to(tl.uint8), mask=inside)


@triton.jit
def _of_blocks(values, start, numel, block, tile: tl.constexpr):
    """One value a block, loaded and spread over the elements of a tile; eight elements lie in the same block."""
    first = start // block
    eight = tl.arange(0, tile // 8) * 8
    index = first + ((start - first * block).to(tl.int32) + eight) // block
    value = tl.load(values + index, mask=start + eight < numel, other=0.0)
    return tl.reshape(tl.broadcast_to(value[:, None], (tile // 8, 8)), (tile,))


@triton.jit
def _encode_once(
    grad, residual, stream, scales, codes, found, numel,
    has_residual: tl.constexpr, levels: tl.constexpr, limit: tl.constexpr,
    bits: tl.constexpr, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    rows: tl.constexpr = tile // block
    start = tl.program_id(0).to(tl.int64) * tile
    at = start + tl.arange(0, tile)
    acc = load_acc(grad, residual, at, at < numel, has_residual)
    largest = tl.max(tl.reshape(magnitude_of(acc), (rows, block)), axis=1)
    if tl.max(largest, axis=0) >= INFINITY:
        tl.store(found, 1)  # whichever program comes first: all write the same
    else:
        if levels == 0:
            scale, inverse = _power_scale(largest)
        else:
            scale, inverse = _level_scale(largest.to(tl.float32, bitcast=True).to(tl.float64), levels, limit)
        row = start // block + tl.arange(0, rows)
        tl.store(scales + row, scale, mask=row * block < numel)
        scale = tl.reshape(tl.broadcast_to(scale[:, None], (rows, block)), (tile,))
        inverse = tl.reshape(tl.broadcast_to(inverse[:, None], (rows, block)), (tile,))
        half = draw(stream, start // 64, tile // 64)
        code, _ = _quantize(acc, scale, inverse, half, levels, bits)
        _store_codes(codes, code, start, numel, bits, width, tile)


@triton.jit
def _keep_largest(largest, found, most, which, inside, alone: tl.constexpr):
    if tl.max(most, axis=0) >= INFINITY:
        tl.store(found, 1)
    if alone:  # no other program has elements of these blocks
        tl.store(largest + which, most, mask=inside)
    else:
        tl.atomic_max(largest + which, most, mask=inside, sem="relaxed")


@triton.jit
def _find_largest(
    grad, residual, largest, found, numel, block, parts,
    has_residual: tl.constexpr, alone: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    which = row // parts
    first = which * block
    start = tl.multiple_of(first + (row - which * parts) * width, [8])
    at = start[:, None] + tl.arange(0, width)[None, :]
    acc = load_acc(grad, residual, at, at < tl.minimum(first + block, numel)[:, None], has_residual)
    most = tl.max(magnitude_of(acc), axis=1)
    _keep_largest(largest, found, most, which, first < numel, alone)


@triton.jit
def _sum_runs(
    grad, residual, largest, sums, found, numel, block, runs, steps,
    has_residual: tl.constexpr, alone: tl.constexpr, rows: tl.constexpr, run: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    which = row // runs
    first = which * block
    start = tl.multiple_of(first + (row - which * runs) * run, [8])
    end = tl.minimum(first + block, numel)[:, None]
    lanes = tl.zeros((rows, 16), tl.float64)
    most = tl.zeros((rows, 16), tl.int32)
    for step in range(steps):
        at = start[:, None] + 16 * step + tl.arange(0, 16)[None, :]
        acc = load_acc(grad, residual, at, at < end, has_residual)
        most = tl.maximum(most, magnitude_of(acc))
        wide = acc.to(tl.float64)
        lanes += wide * wide
    # Sums of two have no order.
    lanes = tl.sum(tl.reshape(lanes, (rows, 2, 8)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (rows, 2, 4)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (rows, 2, 2)), axis=1)
    tl.store(sums + row, tl.sum(lanes, axis=1), mask=first < numel)
    _keep_largest(largest, found, tl.max(most, axis=1), which, first < numel, alone)


@triton.jit
def _find_scales(
    largest, sums, scales, inverses, numel, block, runs,
    l2: tl.constexpr, clip: tl.constexpr, levels: tl.constexpr, limit: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = which * block < numel
    most = tl.load(largest + which, mask=inside, other=0)
    if levels == 0:
        scale, inverse = _power_scale(most)
    else:
        bound = most.to(tl.float32, bitcast=True).to(tl.float64)
        if l2 or clip > 0:
            total = tl.zeros((size,), tl.float64)
            for start in range(0, runs, _AHEAD):
                for ahead in tl.static_range(_AHEAD):  # a sum of squares and 0.0 is the same sum
                    run = tl.zeros_like(which) + (start + ahead)
                    total += tl.load(sums + which * runs + run, mask=inside & (run < runs), other=0.0)
            if l2:
                bound = tl.sqrt(total)
            else:
                members = tl.maximum(tl.minimum(numel - which * block, block), 1).to(tl.float64)
                bound = tl.minimum(bound, tl.sqrt(total / members) * tl.full((size,), clip, tl.float64))
        scale, inverse = _level_scale(bound, levels, limit)
    tl.store(scales + which, scale, mask=inside)
    tl.store(inverses + which, inverse, mask=inside)


@triton.jit
def _encode_scaled(
    grad, residual, stream, scales, inverses, codes, found, numel, block,
    has_residual: tl.constexpr, update: tl.constexpr, levels: tl.constexpr,
    bits: tl.constexpr, width: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    if tl.load(found) == 0:
        start = tl.program_id(0).to(tl.int64) * tile
        at = start + tl.arange(0, tile)
        acc = load_acc(grad, residual, at, at < numel, has_residual)
        scale = _of_blocks(scales, start, numel, block, tile)
        inverse = _of_blocks(inverses, start, numel, block, tile)
        half = draw(stream, start // 64, tile // 64)
        code, decoded = _quantize(acc, scale, inverse, half, levels, bits)
        _store_codes(codes, code, start, numel, bits, width, tile)
        if update:
            tl.store(residual + at, acc - decoded, mask=at < numel)


def encode_stochastic(
    grad: Tensor,
    residual: Tensor | None,
    levels: int,
    block: int,
    norm: str,
    clip: float,
    key: int,
    step: int,
    update: bool = False,
) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_stochastic`, bit for bit."""
    stream = new_stream(key, step, grad.device)
    payload, status = code_stochastic(grad, residual, levels, block, norm, clip, stream, update)
    return nonfinite_sum(grad, residual) if any(status.tolist()) else payload


def encode_powers(
    grad: Tensor, residual: Tensor | None, block: int, key: int, step: int, update: bool = False
) -> Tensor | float:
    """:func:`gradcomp.kernels.reference.encode_powers`, bit for bit."""
    payload, status = code_powers(grad, residual, block, new_stream(key, step, grad.device), update)
    return nonfinite_sum(grad, residual) if any(status.tolist()) else payload


def code_stochastic(
    grad: Tensor,
    residual: Tensor | None,
    levels: int,
    block: int,
    norm: str,
    clip: float,
    stream: Tensor,
    update: bool = False,
) -> tuple[Tensor, Tensor]:
    """Payload and status of :func:`encode_stochastic`; nothing waits.

    Args:
        stream: int64 [2] on the device: :func:`gradcomp.kernels.triton_random.new_stream`.
    """
    return _sweep(grad, residual, levels, levels.bit_length() + 1, block, norm == "l2", clip, stream, update)


def code_powers(
    grad: Tensor, residual: Tensor | None, block: int, stream: Tensor, update: bool = False
) -> tuple[Tensor, Tensor]:
    """Payload and status of :func:`encode_powers`; nothing waits."""
    return _sweep(grad, residual, 0, 8, block, False, 0.0, stream, update)


def _sweep(
    grad: Tensor,
    residual: Tensor | None,
    levels: int,
    bits: int,
    block: int,
    l2: bool,
    clip: float,
    stream: Tensor,
    update: bool,
) -> tuple[Tensor, Tensor]:
    numel, device = grad.numel(), grad.device
    block = min(block, max(triton.next_power_of_2(numel), 8))  # what is larger is one block, too
    blocks, width = -(-numel // block), triton.next_power_of_2(bits)
    payload = torch.empty(4 * blocks + -(-numel * bits // 8), dtype=torch.uint8, device=device)
    scales, codes = payload[: 4 * blocks].view(torch.float32), payload[4 * blocks :]
    status = status_of(grad)  # the first of the two says all
    if not numel:
        return payload, status
    limit = float(torch.tensor(stochastic_limit(bits), dtype=torch.float32))
    update = update and residual is not None
    other = grad if residual is None else residual
    tiles = grid(numel, TILE)
    # Whole blocks, and whole groups of random numbers, in a tile.
    if not (l2 or clip or update) and block <= TILE and block & (block - 1) == 0:
        _encode_once[tiles](
            grad, other, stream, scales, codes, status, numel,
            residual is not None, levels, limit, bits, width, block, TILE, num_warps=_WARPS, **EXACT,
        )  # fmt: skip
        return payload, status
    inverses = _measure(grad, residual, scales, status, block, levels, limit, l2, clip)
    _encode_scaled[tiles](
        grad, other, stream, scales, inverses, codes, status, numel, block,
        residual is not None, update, levels, bits, width, TILE, num_warps=_WARPS, **EXACT,
    )  # fmt: skip
    return payload, status


def _measure(
    grad: Tensor,
    residual: Tensor | None,
    scales: Tensor,
    status: Tensor,
    block: int,
    levels: int,
    limit: float,
    l2: bool,
    clip: float,
) -> Tensor:
    """Write the blocks' scales; returns what to multiply by."""
    numel, blocks = grad.numel(), len(scales)
    other, has_residual = grad if residual is None else residual, residual is not None
    largest = torch.zeros(blocks, dtype=torch.int32, device=grad.device)
    inverses, sums, runs = torch.empty_like(scales), largest, 1
    if l2 or clip:
        runs = -(-block // _RUN)
        sums = torch.empty(blocks * runs, dtype=torch.float64, device=grad.device)
        steps = -(-min(block, _RUN) // 16)
        _sum_runs[grid(blocks * runs, _RUNS)](
            grad, other, largest, sums, status, numel, block, runs, steps, has_residual, runs == 1, _RUNS, _RUN, **EXACT
        )
    else:
        width = min(triton.next_power_of_2(block), TILE)
        parts, rows = -(-block // width), TILE // width
        _find_largest[grid(blocks * parts, rows)](
            grad, other, largest, status, numel, block, parts, has_residual, parts == 1, rows, width, num_warps=_WARPS
        )
    _find_scales[grid(blocks, _BLOCKS)](
        largest, sums, scales, inverses, numel, block, runs, l2, clip, levels, limit, _BLOCKS, num_warps=1, **EXACT
    )
    return inverses
