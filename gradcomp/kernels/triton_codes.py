"""Codes of a few bits, added and looked through, in Triton: one sweep, in which every byte is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels.triton import EXACT, grid
from gradcomp.kernels.triton_blocks import TILE, Layout, place, unpack

__all__ = ["add_codes", "add_float8", "add_levels", "add_pairs", "add_powers", "find_code", "float8_value"]


@triton.jit
def float8_value(code):
    """What the bits of a float8_e4m3fn, as int32, stand for; by integers, as casts differ between Tritons and GPUs."""
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    small = magnitude.to(tl.float32) * 0.001953125  # 2**-9
    absolute = tl.where(magnitude < 8, small, normal)
    return (absolute.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _power(code):
    """What a byte of the reference's encode_powers stands for, as int32, over the block's scale."""
    return (((127 - (code & 127)) << 23) | ((code >> 7) << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _add(
    out, parameters, codes, addend, numel, block, tiles, scale,
    form: tl.constexpr, bits: tl.constexpr, has_addend: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    start, offset, inside, row = place(numel, block, tiles, rows, width)
    exists = row * block < numel
    code = unpack(codes, start, offset, inside, bits)
    if form == "levels":
        low = tl.load(parameters + 2 * row, mask=exists, other=0.0)[:, None]
        step = tl.load(parameters + 2 * row + 1, mask=exists, other=0.0)[:, None]
        value = low + code.to(tl.float32) * step
    elif form == "pairs":
        zero = tl.load(parameters + 2 * row + 1, mask=exists, other=0.0)[:, None]
        one = tl.load(parameters + 2 * row, mask=exists, other=0.0)[:, None]
        value = tl.where(code != 0, one, zero)
    else:
        step = tl.load(parameters + row, mask=exists, other=0.0)[:, None]
        if form == "float8":
            signed = float8_value(code)
        elif form == "powers":
            signed = _power(code)
        elif bits == 2:
            signed = ((code & 1) - (code >> 1)).to(tl.float32)
        else:
            signed = (code - ((1 << (bits - 1)) - 1)).to(tl.float32)
        value = step * signed
    total = tl.load(out + start + offset, mask=inside, other=0.0)
    if has_addend:
        total += tl.load(addend + start + offset, mask=inside, other=0.0).to(tl.float32)
    if form != "pairs":
        value = value * scale
    tl.store(out + start + offset, total + value, mask=inside)


@triton.jit
def _find(packed, found, count, mask, bits: tl.constexpr, width: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    offset = tl.arange(0, width)
    inside = offset < count - start
    codes = unpack(packed, start, offset, inside, bits)
    if tl.max((inside & ((codes & mask) == mask)).to(tl.int32), axis=0) > 0:
        tl.store(found, 1)  # whichever program comes first: all write the same


def _launch(
    out: Tensor,
    parameters: Tensor,
    codes: Tensor,
    form: str,
    bits: int,
    block: int,
    scale: float,
    addend: Tensor | None,
) -> None:
    numel = out.numel()
    if numel:
        layout = Layout.of(numel, block) if block else Layout.whole(numel)
        other = out if addend is None else addend
        _add[layout.grid](
            out, parameters, codes, other, numel, layout.block, layout.tiles, scale,
            form, bits, addend is not None, layout.rows, layout.width, **EXACT,
        )  # fmt: skip


def add_levels(
    out: Tensor, parameters: Tensor, codes: Tensor, bits: int, block: int, scale: float, addend: Tensor | None = None
) -> None:
    """:func:`gradcomp.kernels.reference.add_levels`, bit for bit."""
    _launch(out, parameters.contiguous(), codes, "levels", bits, block, scale, addend)


def add_codes(
    out: Tensor, scales: Tensor, codes: Tensor, bits: int, block: int, scale: float, addend: Tensor | None = None
) -> None:
    """:func:`gradcomp.kernels.reference.add_codes`, bit for bit."""
    _launch(out, scales.contiguous(), codes, "signed", bits, block, scale, addend)


def add_float8(
    out: Tensor, scales: Tensor, codes: Tensor, block: int, scale: float, addend: Tensor | None = None
) -> None:
    """:func:`gradcomp.kernels.reference.add_float8`, bit for bit."""
    _launch(out, scales.contiguous(), codes, "float8", 8, block, scale, addend)


def add_powers(
    out: Tensor, scales: Tensor, codes: Tensor, block: int, scale: float, addend: Tensor | None = None
) -> None:
    """:func:`gradcomp.kernels.reference.add_powers`, bit for bit."""
    _launch(out, scales.contiguous(), codes, "powers", 8, block, scale, addend)


def add_pairs(out: Tensor, scales: Tensor, bits: Tensor, block: int, addend: Tensor | None = None) -> None:
    """``out``, plus ``addend`` if given, plus the first of a block's two scales where an element's bit is 1."""
    _launch(out, scales.contiguous(), bits, "pairs", 1, block, 1.0, addend)


def find_code(packed: Tensor, count: int, bits: int, mask: int) -> bool:
    """:func:`gradcomp.kernels.reference.find_code`; waits for the answer."""
    found = torch.zeros((), dtype=torch.int32, device=packed.device)
    if count:
        _find[grid(count, TILE)](packed, found, count, mask, bits, TILE)
    return bool(found)
