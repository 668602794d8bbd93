"""One bit an element, in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcomp.kernels.reference_chunks import accumulate, chunks, nonfinite_value

__all__ = ["add_bits", "encode_bits", "pack_bits", "unpack_bits"]


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


def encode_bits(grad: Tensor, residual: Tensor | None, block: int) -> tuple[Tensor, Tensor] | float:
    """A sign bit an element, and for each block the mean of its negative elements and of the others (0 where none).

    Args:
        block: a multiple of 8.

    Returns:
        Scales, float32 [blocks, 2]; bits as :func:`pack_bits`, 1 where acc < 0. Or a float if acc is not finite.
    """
    scales, bits = [grad.new_empty((0, 2), dtype=torch.float32)], [grad.new_empty(0, dtype=torch.uint8)]
    for part in chunks(grad.numel(), grad.device, block):
        acc = accumulate(grad, residual, part, None)
        size = acc.numel()
        padded = acc if size % block == 0 else torch.cat([acc, acc.new_zeros(-size % block)])
        rows = padded.view(-1, block)
        negative = rows < 0
        members = torch.full((len(rows),), block, dtype=torch.int64, device=acc.device)
        members[-1] -= padded.numel() - size
        negatives = negative.sum(1)
        # In float64: the sum of a block of finite float32 values may not be a finite float32. Their mean is.
        sums = torch.stack([half.sum(1, dtype=torch.float64) for half in (rows.clamp(max=0), rows.clamp(min=0))])
        if not bool(sums.isfinite().all()):
            return nonfinite_value(acc)
        counts = torch.stack([negatives, members - negatives]).clamp(min=1)
        scales.append((sums / counts).to(torch.float32).t())
        bits.append(pack_bits(negative.view(-1)[:size]))
    return torch.cat(scales), torch.cat(bits)


def add_bits(out: Tensor, scales: Tensor, bits: Tensor, block: int) -> None:
    """``out`` plus each element's scale: the first of its block's two where its bit is 1, else the second."""
    for part in chunks(out.numel(), out.device, block):
        size = part.stop - part.start
        rows = scales[part.start // block : -(-part.stop // block)]
        negative = unpack_bits(bits[part.start // 8 : -(-part.stop // 8)], size)
        whole = size // block * block
        target = out[part]
        if whole:
            full = rows[: whole // block]
            values = torch.where(negative[:whole].view(-1, block), full[:, :1], full[:, 1:])
            target[:whole].view(-1, block).add_(values)
        if whole < size:
            target[whole:] += torch.where(negative[whole:], rows[-1, 0], rows[-1, 1])
