"""Codes of a few bits and what they stand for, in plain torch operations.

A tensor is cut into blocks of ``block`` elements that share their parameters; ``block`` = 0 is one block of all. All
the functions that add do ``out = (out + addend) + decoded * scale``, each operation rounded to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradcomp.kernels.reference_chunks import chunks

__all__ = ["add_codes", "add_float8", "add_levels", "find_code", "pack_codes", "unpack_codes"]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Flat uint8, each below 2**bits, to ``bits`` bits each, lowest bits first; unused bits are 0."""
    if bits == 8:
        return codes.clone()
    count = codes.numel()
    groups = torch.cat([codes, codes.new_zeros(-count % 8)]).view(-1, 8).to(torch.int64)
    words = (groups << torch.arange(0, 8 * bits, bits, device=codes.device)).sum(1)  # they do not overlap
    used = words.view(torch.uint8).view(-1, 8)[:, :bits]
    # Cloned: where a row is one byte, a reshape alone would be a view that is not contiguous.
    return used.clone(memory_format=torch.contiguous_format).view(-1)[: -(-count * bits // 8)]


def unpack_codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of :func:`pack_codes`: the first ``count`` codes, as uint8."""
    if bits == 8:
        return packed[:count]
    groups = -(-count // 8)
    words = packed.new_zeros((groups, 8))
    whole = packed.numel() // bits
    words[:whole, :bits] = packed[: whole * bits].view(whole, bits)
    words[whole:, : packed.numel() - whole * bits] = packed[whole * bits :]
    shifted = words.view(torch.int64) >> torch.arange(0, 8 * bits, bits, device=packed.device)
    return (shifted & ((1 << bits) - 1)).to(torch.uint8).view(-1)[:count]


def find_code(packed: Tensor, count: int, bits: int, mask: int) -> bool:
    """Whether any of ``count`` packed codes has all bits of ``mask`` set."""
    for part in chunks(count, packed.device, 8):
        codes = unpack_codes(_packed(packed, part, bits), part.stop - part.start, bits)
        if bool(((codes & mask) == mask).any()):
            return True
    return False


def add_levels(
    out: Tensor, parameters: Tensor, codes: Tensor, bits: int, block: int, scale: float, addend: Tensor | None = None
) -> None:
    """Add ``low + code * step``.

    Args:
        parameters: float32 [blocks, 2]: low and step of each block.
        codes: as :func:`pack_codes`.
    """
    for part in chunks(out.numel(), out.device, max(block, 8)):
        rows = _rows(parameters, part, block)
        code = unpack_codes(_packed(codes, part, bits), part.stop - part.start, bits).to(torch.float32)
        _add(out, part, _spread(rows[:, 0], part, block) + code * _spread(rows[:, 1], part, block), scale, addend)


def add_codes(
    out: Tensor, scales: Tensor, codes: Tensor, bits: int, block: int, scale: float, addend: Tensor | None = None
) -> None:
    """Add ``scale of the block * signed code``: code - (2**(bits - 1) - 1), or with 2 bits 0, 1, -1 for 00, 01, 10.

    Args:
        scales: float32 [blocks].
        codes: as :func:`pack_codes`; none is all ones.
    """
    for part in chunks(out.numel(), out.device, max(block, 8)):
        code = unpack_codes(_packed(codes, part, bits), part.stop - part.start, bits).to(torch.int16)
        signed = (code & 1) - (code >> 1) if bits == 2 else code - ((1 << (bits - 1)) - 1)
        _add(out, part, _spread(_rows(scales, part, block), part, block) * signed.to(torch.float32), scale, addend)


def add_float8(
    out: Tensor, scales: Tensor, codes: Tensor, block: int, scale: float, addend: Tensor | None = None
) -> None:
    """Add ``scale of the block * code``.

    Args:
        scales: float32 [blocks].
        codes: uint8, the bits of float8_e4m3fn; none is NaN.
    """
    for part in chunks(out.numel(), out.device, max(block, 8)):
        code = codes[part].view(torch.float8_e4m3fn).to(torch.float32)
        _add(out, part, _spread(_rows(scales, part, block), part, block) * code, scale, addend)


def _packed(codes: Tensor, part: slice, bits: int) -> Tensor:
    return codes[part.start * bits // 8 : -(-part.stop * bits // 8)]


def _rows(parameters: Tensor, part: slice, block: int) -> Tensor:
    return parameters[part.start // block : -(-part.stop // block)] if block else parameters


def _spread(values: Tensor, part: slice, block: int) -> Tensor:
    """One value a block to one an element of the part."""
    size = part.stop - part.start
    return values if len(values) == 1 else values.repeat_interleave(min(block, size))[:size]


def _add(out: Tensor, part: slice, values: Tensor, scale: float, addend: Tensor | None) -> None:
    target = out[part]
    if addend is not None:
        target += addend[part]
    target += values * scale
