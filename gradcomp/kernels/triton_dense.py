"""Dense values, added and looked through, in Triton. A cast is one sweep in torch already."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels.triton import EXACT, grid

__all__ = ["add_scaled", "all_finite"]

_BLOCK = 4096


@triton.jit
def _add_scaled(out, values, addend, numel, scale, has_addend: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < numel
    total = tl.load(out + at, mask=inside)
    if has_addend:
        total += tl.load(addend + at, mask=inside).to(tl.float32)
    total += tl.load(values + at, mask=inside).to(tl.float32) * scale
    tl.store(out + at, total, mask=inside)


@triton.jit
def _find_nonfinite(values, found, numel, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    value = tl.load(values + at, mask=at < numel, other=0.0)
    most = tl.max((value.to(tl.int32, bitcast=True) & 0x7FFFFFFF), axis=0)
    if most >= 0x7F800000:
        tl.store(found, 1)  # whichever program comes first: all write the same


def add_scaled(out: Tensor, values: Tensor, scale: float, addend: Tensor | None = None) -> None:
    """:func:`gradcomp.kernels.reference.add_scaled`, bit for bit."""
    numel = out.numel()
    if numel:
        other = out if addend is None else addend
        _add_scaled[grid(numel, _BLOCK)](out, values, other, numel, scale, addend is not None, _BLOCK, **EXACT)


def all_finite(values: Tensor) -> bool:
    """Whether ``values``, flat float32, hold neither NaN nor Inf; waits for the answer."""
    found = torch.zeros((), dtype=torch.int32, device=values.device)
    if values.numel():
        _find_nonfinite[grid(values.numel(), _BLOCK)](values, found, values.numel(), _BLOCK)
    return not bool(found)
