"""One bit an element, in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcomp.kernels.reference_chunks import accumulate, chunks, nonfinite_value
from gradcomp.kernels.reference_sums import robust_sums

__all__ = ["add_bits", "encode_bits", "pack_bits", "pack_signs", "pack_votes", "unpack_bits"]

_FLOAT32_MAX = torch.finfo(torch.float32).max


def pack_bits(bits: Tensor) -> Tensor:
    """Flat bool to uint8, eight to a byte: bit k of byte j is element 8j + k, unused bits are 0."""
    spare = -bits.numel() % 8
    if spare or bits.storage_offset() % 8:
        bits = torch.cat([bits, bits.new_zeros(spare)])
    # Byte i of a word moves to bit i of its top byte; no two partial products overlap.
    top = (bits.view(torch.int64) * 0x0102040810204080).view(torch.uint8)[7::8]
    return top.clone(memory_format=torch.contiguous_format)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_bits`: the first ``numel`` bits, as bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> shifts) & 1).view(torch.bool).view(-1)[:numel]


def encode_bits(
    grad: Tensor,
    residual: Tensor | None,
    block: int,
    symmetric: bool = False,
    update: bool = False,
) -> Tensor | float:
    """A sign bit an element, and for each block what its two values stand for.

    Args:
        block: a multiple of 8.
        symmetric: the scales are minus and plus the mean magnitude of the block; else the mean of its negative elements
            and of the others (0 where there are none).
        update: also make the residual what ``add_bits(residual, -scales, bits, block, addend=grad)`` makes it.

    Returns:
        Float32 scales, two a block, as bytes, then bits as :func:`pack_bits`, 1 where acc < 0; or a float.
    """
    scales, bits = [grad.new_empty((0, 2), dtype=torch.float32)], [grad.new_empty(0, dtype=torch.uint8)]
    block = min(block, max(-(-grad.numel() // 8) * 8, 8))  # no padding to a block that is never full
    for part in chunks(grad.numel(), grad.device, block):
        acc = accumulate(grad, residual, part, None)
        size = acc.numel()
        padded = acc if size % block == 0 else torch.cat([acc, acc.new_zeros(-size % block)])
        rows = padded.view(-1, block)
        negative = rows < 0
        members = torch.full((len(rows),), block, dtype=torch.int64, device=acc.device)
        members[-1] -= padded.numel() - size
        below, above = (robust_sums(torch.where(half, rows, 0.0)) for half in (negative, ~negative))
        if not bool((above - below).isfinite().all()):
            return nonfinite_value(accumulate(grad, residual, slice(part.start, None), None))
        if symmetric:
            mean = _as_float32((above - below) / members)
            scales.append(torch.stack([0.0 - mean, mean], 1))
        else:
            negatives = negative.sum(1)
            counts = torch.stack([negatives, members - negatives]).clamp(min=1)
            scales.append(_as_float32(torch.stack([below, above]) / counts).t())
        bits.append(pack_bits(negative.view(-1)[:size]))
    if update and residual is not None:
        add_bits(residual, -torch.cat(scales), torch.cat(bits), block, addend=grad)
    return torch.cat([*(pair.reshape(-1).view(torch.uint8) for pair in scales), *bits])


def add_bits(
    out: Tensor,
    scales: Tensor,
    bits: Tensor,
    block: int,
    addend: Tensor | None = None,
) -> None:
    """``out``, plus ``addend`` if given, plus each element's scale: the first of its block's two where its bit is 1."""
    for part in chunks(out.numel(), out.device, block):
        size = part.stop - part.start
        rows = scales[part.start // block : -(-part.stop // block)]
        negative = unpack_bits(bits[part.start // 8 : -(-part.stop // 8)], size)
        whole = size // block * block
        target = out[part]
        if addend is not None:
            target.add_(addend[part])
        if whole:
            full = rows[: whole // block]
            values = torch.where(negative[:whole].view(-1, block), full[:, :1], full[:, 1:])
            target[:whole].view(-1, block).add_(values)
        if whole < size:
            target[whole:] += torch.where(negative[whole:], rows[-1, 0], rows[-1, 1])


def pack_signs(grad: Tensor) -> tuple[Tensor, int] | float:
    """A sign bit an element, as :func:`pack_bits`, 1 where negative, and how many elements are 0; or a float."""
    bits, zeros = [grad.new_empty(0, dtype=torch.uint8)], 0
    for part in chunks(grad.numel(), grad.device, 8):
        values = grad[part]
        if not bool(values.isfinite().all()):
            return nonfinite_value(grad[part.start :].to(torch.float32))
        bits.append(pack_bits(values < 0))
        zeros += values.numel() - int(values.count_nonzero())
    return torch.cat(bits), zeros


def pack_votes(grad: Tensor) -> Tensor:
    """The signed MAP of all elements that are not 0: 2 bits an element, 00 zero, 01 plus, 10 minus."""
    codes = [grad.new_empty(0, dtype=torch.uint8)]
    for part in chunks(grad.numel(), grad.device, 4):
        values = grad[part]
        code = (values > 0).to(torch.uint8) + ((values < 0).to(torch.uint8) << 1)
        code = torch.cat([code, code.new_zeros(-code.numel() % 4)])
        # Byte i of a word moves to bits 2i of its top byte; no two partial products overlap.
        top = (code.view(torch.int32) * 0x01041040).view(torch.uint8)[3::4]
        codes.append(top.clone(memory_format=torch.contiguous_format))
    return torch.cat(codes)


def _as_float32(means: Tensor) -> Tensor:
    # Rounded, the mean of the largest float32s may be larger than they are.
    return means.clamp(-_FLOAT32_MAX, _FLOAT32_MAX).to(torch.float32)
