"""Thresholds from samples, in Triton: they stay on the device, where what encodes reads them, and nothing waits."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcomp.kernels.reference_select import sample_size
from gradcomp.kernels.triton import EXACT, grid

__all__ = ["below_least", "float_of", "note_best", "sample_largest", "sample_threshold"]

_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
_LARGEST: tl.constexpr = tl.constexpr(0x7F7FFFFF)  # finite float32
_BLOCK = 1024


@triton.jit(do_not_specialize=["length", "stride"])
def _sample(grad, residual, out, length, stride, weight, has_residual: tl.constexpr, block: tl.constexpr):
    number = tl.program_id(0) * block + tl.arange(0, block)
    inside = number < length
    at = number.to(tl.int64) * stride
    value = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * weight
    if has_residual:
        value += tl.load(residual + at, mask=inside, other=0.0)
    tl.store(out + number, tl.abs(value), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _best(largest, bits_of_best, limit, count, block: tl.constexpr):
    """One program. Of floats without a sign the next smaller one is that of the bits less 1."""
    most = tl.zeros((), tl.float64)
    best = tl.zeros((), tl.int32)
    if tl.load(largest).to(tl.int32, bitcast=True) < _INFINITY:
        for first in range(0, count, block):
            at = first + tl.arange(0, block)
            value = tl.load(largest + at, mask=at < count, other=0.0)
            sent = value.to(tl.float64) * (at + 1).to(tl.float64)  # exact
            here = tl.max(sent, axis=0)
            # Of equally good ones the highest: they fall, so that what comes in a later block is no higher.
            bits = tl.max(tl.where(sent == here, value.to(tl.int32, bitcast=True), 0), axis=0)
            best = tl.where(here > most, bits, best)
            most = tl.where(here > most, here, most)
    best = tl.where(best > 1, best - 1, best)
    tl.store(bits_of_best, best.to(tl.int64))
    tl.store(limit, tl.where(best > 0, best, _LARGEST).to(tl.float32, bitcast=True))


def sample_largest(grad: Tensor, residual: Tensor | None, density: float, weight: float = 1.0) -> Tensor:
    """:func:`gradcomp.kernels.reference.sample_largest`, bit for bit, without waiting."""
    stride, count = sample_size(grad.numel(), density)
    length = -(-grad.numel() // stride)
    sample = grad.new_empty(length, dtype=torch.float32)
    if length:
        held = grad if residual is None else residual
        launch = grid(length, _BLOCK)
        _sample[launch](grad, held, sample, length, stride, weight, residual is not None, _BLOCK, **EXACT)
    return sample.topk(count).values


def note_best(largest: Tensor, bits: Tensor) -> Tensor:
    """Write the :func:`gradcomp.kernels.reference.best_threshold` of ``largest`` to ``bits``, without waiting.

    Args:
        largest: one at least.
        bits: int64, one element, which becomes those of the threshold as float32: see :func:`float_of`.

    Returns:
        float32, 0-dim: what to encode with; if the threshold is 0, the largest number, which nothing finite passes.
    """
    limit = largest.new_empty(())
    _best[(1,)](largest, bits, limit, len(largest), _BLOCK)
    return limit


def below_least(largest: Tensor) -> Tensor:
    """:func:`gradcomp.kernels.reference.below_least` of one number at least, float32, 0-dim, without waiting."""
    least = largest[-1]
    below = torch.nextafter(least, torch.zeros_like(least))
    return below.masked_fill(~largest[0].isfinite(), torch.finfo(torch.float32).max)


def sample_threshold(grad: Tensor, residual: Tensor | None, density: float, weight: float = 1.0) -> float:
    """:func:`gradcomp.kernels.reference.sample_threshold`, bit for bit; waits once."""
    if not grad.numel():
        return 0.0
    bits = torch.empty(1, dtype=torch.int64, device=grad.device)
    note_best(sample_largest(grad, residual, density, weight), bits)
    return float_of(bits.tolist()[0])


def float_of(bits: int) -> float:
    """The float32 of these bits."""
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value
